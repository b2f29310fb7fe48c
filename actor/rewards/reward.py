"""From an answer to a reward: pure functions behind one protocol, chosen by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from actor.rewards.text import exact_match, f1
from protocol.errors import ConfigError
from protocol.types import Question, Status


@dataclass(frozen=True, slots=True)
class Score:
    """`parts` are named scalars for metrics: em, f1, format. They are measured whatever the reward makes of them."""

    reward: float
    parts: Mapping[str, float]


class Reward(Protocol):
    def score(self, *, question: Question, answer: str | None, status: Status) -> Score:
        """`answer` is what the workflow parsed, None where the policy gave none; `status` how the episode ended.

        A trajectory has the format exactly where its status is COMPLETED: the workflow applies the format's rules.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExactMatchReward:
    """1 where the answer is right, else 0; 0 after a format error."""

    def score(self, *, question: Question, answer: str | None, status: Status) -> Score:
        parts = measure(question=question, answer=answer, status=status)
        return Score(parts["em"], parts)


@dataclass(frozen=True, slots=True)
class F1Reward:
    """The largest token F1 over the gold answers; 0 after a format error."""

    def score(self, *, question: Question, answer: str | None, status: Status) -> Score:
        parts = measure(question=question, answer=answer, status=status)
        return Score(parts["f1"], parts)


@dataclass(frozen=True, slots=True)
class MemSearcherReward:
    """0 where the format fails; else the largest F1 where it is above 0, else 0.1 (arXiv 2511.02805)."""

    well_formed_reward: float = 0.1

    def score(self, *, question: Question, answer: str | None, status: Status) -> Score:
        parts = measure(question=question, answer=answer, status=status)
        if not parts["format"]:
            return Score(0.0, parts)
        return Score(parts["f1"] or self.well_formed_reward, parts)


REWARDS: Mapping[str, Reward] = MappingProxyType(
    {"em": ExactMatchReward(), "f1": F1Reward(), "memsearcher": MemSearcherReward()}
)


def reward_named(name: str) -> Reward:
    """Raises: ConfigError for a name that is not in REWARDS."""
    if name not in REWARDS:
        raise ConfigError(f"reward must be one of {', '.join(sorted(REWARDS))}, got {name!r}")
    return REWARDS[name]


def measure(*, question: Question, answer: str | None, status: Status) -> dict[str, float]:
    """em, f1 and format of a trajectory. Without a well-formed answer em and f1 are 0."""
    well_formed = status is Status.COMPLETED and answer is not None
    given = answer if well_formed and answer is not None else None
    return {
        "em": exact_match(given, question.answers) if given is not None else 0.0,
        "f1": f1(given, question.answers) if given is not None else 0.0,
        "format": float(well_formed),
    }
