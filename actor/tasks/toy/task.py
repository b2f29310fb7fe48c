"""The toy's questions and documents, one collection of documents a world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson

from actor.rewards.reward import Reward
from actor.tasks.toy.world import Walk, World
from protocol.errors import ConfigError
from protocol.types import Passage, Question


class ToyQuestions:
    """Implements `Task`. Questions rotate over the worlds; each is drawn from (seed, cursor), without end.

    metadata: `collection`, the index to search, and `hops`.
    """

    def __init__(self, worlds: Sequence[World], *, reward: Reward, seed: int) -> None:
        if not worlds:
            raise ConfigError("the toy task needs at least one world, got none")
        self._worlds = tuple(worlds)
        self._reward = reward
        self._seed = seed

    @property
    def num_questions(self) -> None:
        return None

    @property
    def reward(self) -> Reward:
        return self._reward

    def walk(self, cursor: int) -> tuple[World, Walk]:
        """The world of question `cursor` and the way through it."""
        world = self._worlds[cursor % len(self._worlds)]
        return world, world.draw_walk(np.random.default_rng([self._seed, world.seed, cursor]))

    def question(self, cursor: int) -> Question:
        world, walk = self.walk(cursor)
        return Question(
            id=f"{world.collection}/{cursor}",
            text=question_text(walk),
            answers=(walk.answer,),
            metadata={"collection": world.collection, "hops": str(len(walk.facts))},
        )


def question_text(walk: Walk) -> str:
    return f"what is {walk.start} {' '.join(walk.relations)} ?"


def documents(world: World) -> tuple[Passage, ...]:
    """One document a fact: subject, relation, object, stop."""
    return tuple(
        Passage(id=f"{world.collection}/{k}", title="", text=f"{fact.subject} {fact.relation} {fact.object} .")
        for k, fact in enumerate(world.facts.values())
    )


def write_corpus(path: Path, world: World) -> int:
    """Writes `documents(world)` as JSONL for `palimpsest index`, and returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    passages = documents(world)
    with path.open("wb") as file:
        for passage in passages:
            row = {"id": passage.id, "title": passage.title, "text": passage.text}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return len(passages)
