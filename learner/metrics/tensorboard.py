"""Writes TensorBoard events: the layout of the CUSTOM SCALARS tab, then the values of the metrics (docs/metrics.md)."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from learner.metrics.layout import custom_scalars, tensorboard_tag

log = logging.getLogger(__name__)

_REOPEN_AFTER_S = 10.0
_LOG_EVERY_S = 60.0


class TensorBoardWriter:
    """Writes TensorBoard events into `folder`; thread-safe. Events that the disk has no room for are dropped.

    `step` of every method: the step of the values; `name`: of the metric.

    purge_step: TensorBoard hides earlier events of this step and later steps, because a resumed run writes them again
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None, reopen_after_s: float = _REOPEN_AFTER_S) -> None:
        self._folder = folder
        self._reopen_after_s = reopen_after_s
        self._purge_step = purge_step
        self._writer: SummaryWriter | None = None
        self._failed_s = -math.inf
        self._lock = threading.Lock()
        self._write(lambda writer: None)

    def _write(self, add: Callable[[SummaryWriter], object]) -> None:
        """Calls `add`. If the disk cannot be written, drops the event, and opens a new file `reopen_after_s` later."""
        with self._lock:
            if self._writer is None and time.monotonic() - self._failed_s < self._reopen_after_s:
                return
            try:
                if self._writer is None:
                    self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, flush_secs=5)
                    self._purge_step = None
                    self._writer.add_custom_scalars(custom_scalars())
                add(self._writer)
            except OSError as error:
                now_s = time.monotonic()
                if now_s - self._failed_s > _LOG_EVERY_S:
                    log.warning("TensorBoard events cannot be written and are dropped until there is room: %s", error)
                self._failed_s = now_s
                self._abandon()

    def _abandon(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Writes values by name."""
        for name, value in values.items():
            self._write(lambda writer, n=name, v=value: writer.add_scalar(tensorboard_tag(n), v, global_step=step))

    def counts(self, name: str, counts: Mapping[int, int], *, step: int) -> None:
        """Writes a histogram of integers >= 0 with one bucket per integer; nothing if `counts` is empty."""
        if not counts:
            return
        values = np.arange(max(counts) + 1)
        num = np.array([counts.get(value, 0) for value in values.tolist()], dtype=np.int64)
        self._write(
            lambda writer: writer.add_histogram_raw(
                tensorboard_tag(name),
                min=float(min(counts)),
                max=float(max(counts)),
                num=int(num.sum()),
                sum=float((values * num).sum()),
                sum_squares=float((values**2 * num).sum()),
                bucket_limits=(values + 0.5).tolist(),
                bucket_counts=num.tolist(),
                global_step=step,
            )
        )

    def text(self, name: str, markdown: str, *, step: int) -> None:
        self._write(lambda writer: writer.add_text(tensorboard_tag(name), markdown, global_step=step))

    def close(self) -> None:
        """Flushes and closes the event file."""
        with self._lock:
            self._abandon()
