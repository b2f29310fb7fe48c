"""The paths in a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`root` is `run.dir`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config, as JSON."""
        return self.root / "config.json"

    @property
    def store(self) -> Path:
        """The SQLite store: leases, groups, batches, publications."""
        return self.root / "store.sqlite"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def engine_token(self) -> Path:
        """Bearer token of the engines that the launcher starts, if `network.api_key_file` is unset."""
        return self.root / "engine.token"

    @property
    def finished(self) -> Path:
        """Written by the learner after its last step."""
        return self.root / "finished.json"

    @property
    def progress(self) -> Path:
        """What the learner does or waits for now (`learner.metrics.progress` writes and reads it)."""
        return self.root / "progress.json"

    @property
    def first_samples(self) -> Path:
        """A summary of the run's first trajectories."""
        return self.root / "first_samples.txt"

    @property
    def drift(self) -> Path:
        """The report of a `check_drift` run."""
        return self.root / "drift.txt"

    @property
    def replay(self) -> Path:
        """Default folder of a replay of this run."""
        return self.root / "replay"

    @property
    def replay_key(self) -> Path:
        """In the folder of a replay: the folder of the recorded run and the resume key of the replay."""
        return self.root / "replay.json"

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.root / "logs"

    @property
    def processes(self) -> Path:
        """Process name → pid of the processes that the launcher runs."""
        return self.root / "processes.json"

    @property
    def temporary(self) -> Path:
        """Temporary files of the run's processes; the launcher removes it."""
        return self.root / "tmp"

    @property
    def learner_lock(self) -> Path:
        """Locked by the learner that runs in this folder."""
        return self.root / "learner.lock"

    @property
    def launcher_lock(self) -> Path:
        """Locked by the launcher that runs in this folder."""
        return self.root / "launcher.lock"

    @property
    def report(self) -> Path:
        """The demo's results."""
        return self.root / "report.json"

    def log(self, name: str) -> Path:
        """The log of the process `name`."""
        return self.logs / f"{name}.log"

    def failed_batch(self, step: int) -> Path:
        """The groups of a batch whose loss or gradient was not finite (`protocol.codec.unpack_groups` reads them)."""
        return self.root / f"non-finite-step-{step}.groups"
