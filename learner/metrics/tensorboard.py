"""Writes TensorBoard events. docs/metrics.md explains every tag."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes TensorBoard events into `folder`. `step` of every method: the step of the values.

    purge_step: TensorBoard hides earlier events of this step and later steps, because a resumed run writes them again
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=5)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Writes values by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, global_step=step)

    def counts(self, tag: str, counts: Mapping[int, int], *, step: int) -> None:
        """Writes a histogram of integers >= 0 with one bucket per integer; nothing if `counts` is empty."""
        if not counts:
            return
        values = np.arange(max(counts) + 1)
        num = np.array([counts.get(value, 0) for value in values.tolist()], dtype=np.int64)
        self._writer.add_histogram_raw(
            tag,
            min=float(min(counts)),
            max=float(max(counts)),
            num=int(num.sum()),
            sum=float((values * num).sum()),
            sum_squares=float((values**2 * num).sum()),
            bucket_limits=(values + 0.5).tolist(),
            bucket_counts=num.tolist(),
            global_step=step,
        )

    def text(self, tag: str, markdown: str, *, step: int) -> None:
        self._writer.add_text(tag, markdown, global_step=step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
