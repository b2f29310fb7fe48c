"""Writes TensorBoard events: the layout of the CUSTOM SCALARS tab, then the values of the metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from learner.metrics.layout import custom_scalars, tensorboard_tag


class TensorBoardWriter:
    """Writes TensorBoard events into `folder`. `step` of every method: the step of the values; `name`: of the metric.

    purge_step: TensorBoard hides earlier events of this step and later steps, because a resumed run writes them again
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=5)
        self._writer.add_custom_scalars(custom_scalars())

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Writes values by name."""
        for name, value in values.items():
            self._writer.add_scalar(tensorboard_tag(name), value, global_step=step)

    def counts(self, name: str, counts: Mapping[int, int], *, step: int) -> None:
        """Writes a histogram of integers >= 0 with one bucket per integer; nothing if `counts` is empty."""
        if not counts:
            return
        values = np.arange(max(counts) + 1)
        num = np.array([counts.get(value, 0) for value in values.tolist()], dtype=np.int64)
        self._writer.add_histogram_raw(
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

    def text(self, name: str, markdown: str, *, step: int) -> None:
        self._writer.add_text(tensorboard_tag(name), markdown, global_step=step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
