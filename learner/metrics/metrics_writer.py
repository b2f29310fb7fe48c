"""Writes the metrics of each step: TensorBoard events, a line of metrics.jsonl, and some trajectories as text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from learner.metrics.jsonl import LineWriter, format_line
from learner.metrics.loop_metrics import TEXT_EVERY_STEPS
from learner.metrics.rollout_metrics import rollout_metrics
from learner.metrics.step_metrics import StepMetrics
from learner.metrics.tensorboard import TensorBoardWriter
from learner.metrics.trajectory_text import best_and_worst, render_trajectory
from learner.store.run_folder import RunFolder
from protocol.errors import DataError
from protocol.resident_memory import resident_mb
from protocol.types import TrajectoryGroup


class MetricsWriter:
    """A context manager that appends to the metrics in `run_dir`. `step`: the first step that it will record.

    If a learner was killed after it recorded a step but before the step was logged in the store, metrics.jsonl gets two
    lines of that step; readers use the last one. While the disk is full, TensorBoard events are dropped, and lines of
    metrics.jsonl are kept in memory.

    Raises: DataError if `tokenizer_folder` has no tokenizer.json.
    """

    def __init__(self, run_dir: Path, *, step: int, tokenizer_folder: Path, staleness_bound: int) -> None:
        path = tokenizer_folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"model folder {tokenizer_folder} has no tokenizer.json; save its fast tokenizer there")
        tokenizer = Tokenizer.from_file(str(path))
        folder = RunFolder(run_dir)
        self._writer = TensorBoardWriter(folder.tensorboard, purge_step=step)
        self._lines = LineWriter(folder.metrics)
        self._tokenizer = tokenizer
        self._staleness_bound = staleness_bound
        self._last = time.perf_counter()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._lines.flush()

    def record(
        self,
        stepped: StepMetrics,
        groups: Sequence[TrajectoryGroup],
        *,
        wait_s: float,
        publish_s: float,
        num_checkpoint_failures: int,
        gauges: Mapping[str, float],
    ) -> dict[str, float]:
        """Writes the metrics of the step that trained `groups`; returns them by tag.

        wait_s                   time that the loop waited for the batch
        publish_s                time that publishing took
        num_checkpoint_failures  failed attempts to write a checkpoint, since the learner's start
        gauges                   queue lengths and the counters of actors and engines, by tag
        """
        now = time.perf_counter()
        interval_s, self._last = now - self._last, now
        values = {
            **rollout_metrics(groups, interval_s=interval_s),
            **stepped.values,
            "staleness/bound": self._staleness_bound,
            "learner/wait_s": wait_s,
            "learner/publish_s": publish_s,
            "learner/checkpoint_failures": num_checkpoint_failures,
            "learner/resident_mb": resident_mb(),
            **gauges,
        }
        self._writer.scalars(values, step=stepped.step)
        self._writer.counts("staleness/histogram", stepped.tokens_by_age, step=stepped.step)
        if stepped.step % TEXT_EVERY_STEPS == 0:
            self._write_trajectories(groups, step=stepped.step)
        counts = {"tokens_by_age": stepped.tokens_by_age, "tokens_by_context": stepped.tokens_by_context}
        self._lines.append(format_line({"time": time.time(), "step": stepped.step, **values}, counts))
        return values

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Writes a text to TensorBoard. May be called in any thread."""
        self._writer.text(tag, markdown, step=step)

    def _write_trajectories(self, groups: Sequence[TrajectoryGroup], *, step: int) -> None:
        for which, (question, trajectory) in best_and_worst(groups).items():
            text = render_trajectory(trajectory, question=question, decode=self._decode)
            self._writer.text(f"trajectories/{which}", text, step=step)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
