"""A step's record: TensorBoard under RUN/tensorboard, one JSON line in RUN/metrics.jsonl, some trajectories as text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from learner.metrics.jsonl import format_line, open_lines
from learner.metrics.step_metrics import StepMetrics
from learner.metrics.tensorboard import TensorBoardWriter, render_trajectory, summarise_rollouts
from learner.store.run_folder import RunFolder
from protocol.errors import DataError
from protocol.resident_memory import resident_mb
from protocol.types import TrajectoryGroup

_TEXT_EVERY_STEPS = 10


class MetricsWriter:
    """A context manager. A step can have two lines where a learner was killed before it was logged: the last counts.

    Raises: DataError where `tokenizer_folder` has no tokenizer.json.
    """

    def __init__(self, run_dir: Path, *, step: int, tokenizer_folder: Path) -> None:
        path = tokenizer_folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"model folder {tokenizer_folder} has no tokenizer.json; save its fast tokenizer there")
        tokenizer = Tokenizer.from_file(str(path))
        self._writer = TensorBoardWriter(run_dir / "tensorboard", purge_step=step)
        self._lines = open_lines(RunFolder(run_dir).metrics)
        self._tokenizer = tokenizer
        self._last = time.perf_counter()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._lines.close()

    def record(
        self,
        stepped: StepMetrics,
        groups: Sequence[TrajectoryGroup],
        *,
        wait_s: float,
        publish_s: float,
        gauges: Mapping[str, float],
    ) -> None:
        """`wait_s`: how long the loop waited for the batch; `gauges`: queue lengths and the peers' counters by tag."""
        now = time.perf_counter()
        interval_s, self._last = now - self._last, now
        summary = summarise_rollouts(groups)
        extra = {
            "learner/wait_s": wait_s,
            "learner/publish_s": publish_s,
            "learner/resident_mb": resident_mb(),
            "rollout/tokens_per_s": summary.num_sampled_tokens / interval_s,
            **gauges,
        }
        self._writer.step(stepped)
        self._writer.rollouts(summary, step=stepped.step)
        self._writer.scalars(extra, step=stepped.step)
        if stepped.step % _TEXT_EVERY_STEPS == 0:
            self._write_trajectories(groups, step=stepped.step)
        line = {
            "time": time.time(),
            "step": stepped.step,
            **summary.scalars(),
            **stepped.scalars(),
            **extra,
        }
        counts = {
            "tokens_by_age": {age: count for age, count in enumerate(stepped.staleness_counts) if count},
            "tokens_by_context": stepped.context_counts,
        }
        self._lines.write(format_line(line, counts))

    def _write_trajectories(self, groups: Sequence[TrajectoryGroup], *, step: int) -> None:
        """The best and the worst trajectory of the batch's first group."""
        group = groups[0]
        ranked = sorted(group.trajectories, key=lambda trajectory: trajectory.reward)
        for tag, trajectory in (("best", ranked[-1]), ("worst", ranked[0])):
            texts = [
                self._tokenizer.decode(context.token_ids.tolist(), skip_special_tokens=False)
                for context in trajectory.contexts
            ]
            question = f"{group.question.text} (gold: {' | '.join(group.question.answers)})"
            self._writer.trajectory(tag, render_trajectory(trajectory, texts, question=question), step=step)
