"""Named places where a process can be made to die, so that tests prove what survives there.

`PALIMPSEST_FAULT=name:count` kills the process (SIGKILL) when it comes to that place for the count-th time. The places
are at every commit, acknowledgement and rename, one before it and one after. A launcher gives the variable to the
first start of each process only, so that what dies comes back.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import cache

from protocol.errors import ConfigError

VARIABLE = "PALIMPSEST_FAULT"

FAULT_POINTS = {
    "store.claim.open": "learner: a new run's identity is written and not committed",
    "store.claim.durable": "learner: it is committed",
    "store.lease.open": "learner: a lease is written and not committed",
    "store.lease.durable": "learner: it is committed, and the actor has not heard of it",
    "store.group.open": "learner: a group and the decision on it are written and not committed",
    "store.group.durable": "learner: they are committed, and the actor has no acknowledgement",
    "store.end.open": "learner: the end of a lease without a group is written and not committed",
    "store.end.durable": "learner: it is committed",
    "store.batch.open": "learner: a trained batch is written to the log and not committed",
    "store.batch.durable": "learner: it is committed, and its version is not published",
    "store.retention.open": "learner: tokens of an old batch are dropped and that is not committed",
    "store.retention.durable": "learner: it is committed",
    "store.publication.open": "learner: a publication id is written and not committed",
    "store.publication.durable": "learner: it is committed, and nothing is offered under it",
    "acknowledgement.sent": "learner: an actor has been told what became of its group",
    "checkpoint.written": "learner: a checkpoint is on the disk under its temporary name",
    "checkpoint.renamed": "learner: it has its name, and the folder is not fsynced",
    "checkpoint.discarded": "learner: an old checkpoint has lost its name, and its files are there",
    "publication.offered": "learner: a publication can be fetched and is not announced",
    "publication.announced": "learner: it is announced",
    "run.finished": "learner: finished.json is written and has not its name",
    "agent.prepared": "engine: a publication is verified and on the disk, and the engine has not heard of it",
    "agent.updated": "engine: it holds the new weights and is paused",
    "agent.committed": "engine: it runs again, and nobody has been told",
    "actor.finished": "actor: a group is complete and not sent",
    "actor.sent": "actor: it is sent and not acknowledged",
    "actor.acknowledged": "actor: the acknowledgement has come",
}


@dataclass(slots=True)
class _Fault:
    name: str
    num_left: int


def fault_point(name: str) -> None:
    """Dies here if the environment says so; otherwise costs a look-up."""
    fault = _armed()
    if fault is not None and fault.name == name:
        fault.num_left -= 1
        if fault.num_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@cache
def _armed() -> _Fault | None:
    """What the environment asks for, read once. Raises: ConfigError."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    name, _, count = text.partition(":")
    if name not in FAULT_POINTS or not count.isdecimal() or int(count) < 1:
        raise ConfigError(
            f"{VARIABLE} must be name:count with a count >= 1, got {text!r}; names: {', '.join(FAULT_POINTS)}"
        )
    return _Fault(name, int(count))
