"""Named points at which a process can be made to kill itself, so that tests can check the recovery from a crash there.

`PALIMPSEST_FAULT=name:count` kills the process (SIGKILL) when it reaches that point for the count-th time. The points
are before and after every commit, acknowledgement and rename. A launcher sets the variable only for the first start of
each process, so that the restarted process does not die again.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from protocol.errors import ConfigError

VARIABLE = "PALIMPSEST_FAULT"

FAULT_POINTS = {
    "store.claim.open": "learner: a new run's identity is written, not yet committed",
    "store.claim.durable": "learner: the identity is committed",
    "store.lease.open": "learner: a lease is written, not yet committed",
    "store.lease.durable": "learner: the lease is committed, not yet sent to the actor",
    "store.group.open": "learner: a group and the decision on it are written, not yet committed",
    "store.group.durable": "learner: both are committed, not yet acknowledged to the actor",
    "store.end.open": "learner: the end of a lease without a group is written, not yet committed",
    "store.end.durable": "learner: the end of the lease is committed",
    "store.batch.open": "learner: a trained batch is written to the batch log, not yet committed",
    "store.batch.durable": "learner: the batch is committed, its version not yet published",
    "store.retention.open": "learner: tokens of an old batch are deleted, not yet committed",
    "store.retention.durable": "learner: the deletion is committed",
    "store.publication.open": "learner: a publication id is written, not yet committed",
    "store.publication.durable": "learner: the publication id is committed, nothing can be fetched under it yet",
    "acknowledgement.sent": "learner: the acknowledgement of a group is sent to its actor",
    "checkpoint.written": "learner: a checkpoint is on disk under its temporary name",
    "checkpoint.renamed": "learner: the checkpoint has its final name, the folder is not yet fsynced",
    "checkpoint.discarded": "learner: an old checkpoint is renamed, its files are not yet deleted",
    "publication.offered": "learner: a publication can be fetched, not yet announced",
    "publication.announced": "learner: the publication is announced",
    "run.finished": "learner: finished.json is written under its temporary name",
    "agent.prepared": "engine: a publication is verified and on disk, not yet loaded by the engine",
    "agent.updated": "engine: the engine has loaded the new weights and is paused",
    "agent.committed": "engine: the engine runs again, the new version is not yet reported",
    "actor.finished": "actor: a group is complete, not yet sent",
    "actor.sent": "actor: the group is sent, not yet acknowledged",
    "actor.acknowledged": "actor: the acknowledgement is received",
}


CLOCK_VARIABLE = "PALIMPSEST_CLOCK_SHIFT_S"
CLOCK_FILE = "clock-shift-s"


def wall_clock_s() -> float:
    """Seconds since the epoch, plus the shift of this process's clock, if a test sets one."""
    return time.time() + _clock_shift_s()


@cache
def _clock_shift_s() -> float:
    """PALIMPSEST_CLOCK_SHIFT_S, or the number in the file that chaos writes into the TMPDIR of a launcher's roles."""
    if text := os.environ.get(CLOCK_VARIABLE):
        return float(text)
    if "PALIMPSEST_LAUNCHER_PID" not in os.environ or "TMPDIR" not in os.environ:
        return 0.0
    try:
        return float((Path(os.environ["TMPDIR"]) / CLOCK_FILE).read_text())
    except (OSError, ValueError):
        return 0.0


@dataclass(slots=True)
class _Fault:
    name: str
    num_left: int


def fault_point(name: str) -> None:
    """Kills the process if PALIMPSEST_FAULT names this point and its count is reached; else it costs one look-up."""
    fault = _configured_fault()
    if fault is not None and fault.name == name:
        fault.num_left -= 1
        if fault.num_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@cache
def _configured_fault() -> _Fault | None:
    """Reads PALIMPSEST_FAULT once. Raises: ConfigError."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    name, _, count = text.partition(":")
    if name not in FAULT_POINTS or not count.isdecimal() or int(count) < 1:
        raise ConfigError(
            f"{VARIABLE} must be name:count with a count >= 1, got {text!r}; names: {', '.join(FAULT_POINTS)}"
        )
    return _Fault(name, int(count))
