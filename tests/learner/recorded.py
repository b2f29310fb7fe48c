"""Makes a run folder with recorded batches, like a learner's, without servers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from learner.leases.decisions import Ended, EntryChanged, Granted, Trained
from learner.leases.entries import Entry, LeaseRecord, State
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.config import Config
from protocol.config_file import load_config
from protocol.types import TrajectoryGroup
from tests.learner.tiny import group, save_tiny_model
from tests.leases.groups import arrived


def groups_of(step: int, *, num: int = 2) -> list[TrajectoryGroup]:
    """Groups of the last two versions; their contexts deliberately have no common prefix."""
    versions = tuple(range(max(0, step - 1), step + 1))
    return [group(100 * step + i, versions=versions, cursor=num * step + i) for i in range(num)]


def record_run(folder: Path, *, num_steps: int) -> Path:
    folder.mkdir(parents=True)
    with closing(Store(RunFolder(folder).store)) as store:
        for step in range(num_steps):
            groups = groups_of(step)
            for each in groups:
                lease_id = each.cursor + 1
                store.commit(
                    [
                        Granted(LeaseRecord(lease_id, each.cursor, each.cursor, 0, "actor", 0.0), engine_version=step),
                        arrived(each, lease_id=lease_id),
                        EntryChanged(Entry(each.cursor, each.cursor, 0, State.BUFFERED, each.cursor)),
                        Ended(lease_id, "accepted"),
                    ]
                )
            store.commit([Trained(step, tuple(each.cursor for each in groups))])
    return folder


def replay_config(folder: Path, *overrides: str) -> tuple[Path, Config]:
    """Writes a config file and a tiny model to `folder`; returns the file and the config read from it."""
    model = save_tiny_model(folder / "model")
    path = folder / "run.toml"
    path.write_text(
        f"""
[run]
dir = "out"
[model]
path = "{model}"
[task]
kind = "toy"
worlds = [0]
[learner]
num_steps = 10
tokens_per_micro_batch = 64
[learner.loss]
minibatches = 2
[learner.optimizer]
learning_rate = 1e-2
schedule = "cosine"
warmup_steps = 2
[learner.checkpoint]
every_steps = 2
"""
    )
    return path, load_config(path, overrides)
