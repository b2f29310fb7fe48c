"""Draws the faults of `palimpsest chaos` from a seed. Pure."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from learner.launch.restart_policy import RestartPolicy

FaultKind = Literal["kill", "stop", "slow", "cut", "full", "damage", "clock", "drain", "flood"]
"""kill: SIGKILL. stop: SIGSTOP, then SIGCONT. slow: stopped 90 % of the time. cut: TCP connections are shut down.

full: no file of the learner can grow. damage: a file of the newest checkpoint is damaged, then the learner is killed.
clock: the learner is killed, and its clock is an hour behind in its next life. drain: SIGTERM to an actor. flood: junk
messages to the learner.
"""

ALL_ROLES = ("learner", "actor", "engine", "retriever")
_ROLES: dict[FaultKind, tuple[str, ...]] = {
    "kill": ALL_ROLES,
    "stop": ALL_ROLES,
    "slow": ALL_ROLES,
    "cut": ALL_ROLES,
    "full": ("learner",),
    "damage": ("learner",),
    "clock": ("learner",),
    "drain": ("actor",),
    "flood": ("learner",),
}
KINDS: tuple[FaultKind, ...] = tuple(_ROLES)
KILLS: tuple[FaultKind, ...] = ("kill", "damage", "clock", "drain")
"""The faults that end their process."""

# (shortest, longest) duration. The longest stop exceeds the time after which an engine without reports is not serving.
_DURATION_S: dict[FaultKind, tuple[float, float]] = {
    "stop": (0.5, 10.0),
    "slow": (2.0, 10.0),
    "cut": (0.5, 5.0),
    "full": (1.0, 8.0),
    "flood": (0.5, 5.0),
}
_PROCESS_NAME = re.compile(r"(learner|actor|engine|retriever)(-\d+)?")

RunKind = Literal["orphan", "poison"]
"""Faults of a run that chaos starts itself.

orphan: the learner is stopped and its launcher killed; then the same command resumes the run. poison: a question that
kills every actor that gets it.
"""
RUN_KINDS: tuple[RunKind, ...] = ("orphan", "poison")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What `palimpsest chaos --runs` does in each run. `every_s`: mean pause between faults."""

    kinds: Sequence[FaultKind]
    run_kinds: Sequence[RunKind]
    roles: Sequence[str]
    num_faults: int
    every_s: float


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    for_s     duration; 0 for those that end the process
    pause_s   pause before it
    ended_at  Unix time; 0 until it has ended
    """

    process: str
    kind: FaultKind
    for_s: float
    pause_s: float
    ended_at: float = 0.0

    @property
    def role(self) -> str:
        return role_of(self.process)


def role_of(process: str) -> str:
    return process.partition("-")[0]


def draw(rng: random.Random, *, kinds: Sequence[FaultKind], processes: Sequence[str], every_s: float) -> Fault | None:
    """Draws the next fault; None if no kind applies to one of the processes.

    Kind, process and duration are uniform; the pause is exponential with mean `every_s`, and at most three times it.
    """
    roles = {role_of(name) for name in processes}
    possible: list[FaultKind] = [kind for kind in kinds if roles.intersection(_ROLES[kind])]
    if not possible:
        return None
    kind = rng.choice(possible)
    return Fault(
        process=rng.choice([name for name in processes if role_of(name) in _ROLES[kind]]),
        kind=kind,
        for_s=rng.uniform(*_DURATION_S.get(kind, (0, 0))),
        pause_s=min(3 * every_s, rng.expovariate(1 / every_s)),
    )


def eligible_processes(
    pids: Mapping[str, int],
    *,
    roles: Collection[str],
    disturbed: Collection[str] = (),
    kills: Sequence[tuple[str, int]] = (),
    newest_step: int = 0,
) -> list[str]:
    """The names, sorted, of the processes that the next fault may hit.

    These are the restartable processes of `roles`, except those that have a fault now (`disturbed`), and those that one
    more kill before the next step might bring to `RestartPolicy.max_restarts`.

    kills: (process, the run's newest step at the time) of each kill so far
    """
    num_kills = Counter(name for name, step in kills if step == newest_step)
    limit = RestartPolicy().max_restarts - 1
    return sorted(
        name
        for name in pids
        if (match := _PROCESS_NAME.fullmatch(name)) is not None
        and match[1] in roles
        and name not in disturbed
        and num_kills[name] < limit
    )
