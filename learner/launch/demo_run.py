"""A demo's settings, the paths in its folder, and the choice of the folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from learner.store.run_folder import RunFolder
from protocol.errors import DataError
from protocol.evaluation import EvaluationFolder

_NUM_TRAINING_WORLDS = 4
_SETTINGS_NAME = "demo.json"


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The options of `palimpsest demo` that determine its result. A stopped demo resumes only with equal ones."""

    seed: int
    num_steps: int
    num_actors: int
    num_eval_questions: int
    staleness_bound: int
    ablation: str


@dataclass(frozen=True, slots=True)
class DemoRun:
    """The settings and paths of one demo. `run_dir` is absolute."""

    settings: DemoSettings
    run_dir: Path
    quiet: bool

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_dir)

    @property
    def settings_path(self) -> Path:
        return self.run_dir / _SETTINGS_NAME

    @property
    def seconds(self) -> Path:
        """Seconds per phase."""
        return self.run_dir / "seconds.json"

    @property
    def data(self) -> Path:
        """Corpora, tokenizer, demonstrations and indexes of the toy worlds."""
        return self.run_dir / "toy"

    @property
    def model(self) -> Path:
        """The policy after the warm start."""
        return self.run_dir / "warm-start"

    def evaluation(self, when: str, how: str) -> EvaluationFolder:
        """The folder of one evaluation. `when`: "before" or "after" RL. `how`: "sampled" or "greedy"."""
        return EvaluationFolder(self.run_dir / "evaluations" / f"{when}-{how}")

    def index(self, world: int) -> Path:
        return self.data / "indexes" / f"world-{world}"

    def corpus(self, world: int) -> Path:
        return self.data / "corpora" / f"world-{world}.jsonl"

    @property
    def worlds(self) -> tuple[int, ...]:
        """The training worlds."""
        return tuple(10 * self.settings.seed + i for i in range(1, _NUM_TRAINING_WORLDS + 1))

    @property
    def eval_world(self) -> int:
        return 10 * self.settings.seed + 9

    @property
    def all_worlds(self) -> tuple[int, ...]:
        return (*self.worlds, self.eval_world)


def choose_folder(requested: Path | None, settings: DemoSettings) -> Path:
    """Returns `requested`, or the first runs/demo-N that is free or contains a resumable demo.

    Raises: DataError if `requested` contains a finished demo or a demo with other settings.
    """
    if requested is None:
        number = 1
        while (folder := Path("runs") / f"demo-{number}").exists() and not _is_resumable(folder, settings):
            number += 1
        return folder
    if RunFolder(requested).report.is_file():
        raise DataError(f"--run-dir {requested} contains a finished demo (see its report.json): choose another")
    if (requested / _SETTINGS_NAME).is_file() and not _is_resumable(requested, settings):
        raise DataError(
            f"--run-dir {requested} contains a demo with other options (see its {_SETTINGS_NAME}): choose another"
        )
    return requested


def _is_resumable(folder: Path, settings: DemoSettings) -> bool:
    """Whether `folder` contains an unfinished demo with these settings."""
    path = folder / _SETTINGS_NAME
    return (
        path.is_file() and not RunFolder(folder).report.is_file() and json.loads(path.read_text()) == asdict(settings)
    )
