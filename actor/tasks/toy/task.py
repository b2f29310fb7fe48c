"""The toy's questions and documents, one collection of documents per world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
from pydantic import Field

from actor.tasks.task import Split, Task
from actor.tasks.toy.world import Walk, World, make_world
from protocol.config_base import NonNegative, Options
from protocol.errors import ConfigError
from protocol.types import Passage, Question


class ToyOptions(Options):
    """Options of the task toy."""

    worlds: tuple[NonNegative, ...] = Field(default=(), description="Seeds of the training worlds.")
    eval_worlds: tuple[NonNegative, ...] = Field(default=(), description="Seeds of the evaluation worlds.")


class ToyTask(Task):
    """Questions rotate over the worlds. Each is drawn from (seed, world, cursor); their number is unlimited.

    metadata: `collection`, the index to search, and `hops`.
    """

    Options = ToyOptions
    options: ToyOptions

    def __init__(self, options: ToyOptions, *, split: Split, seed: int) -> None:
        """Raises: ConfigError if no world is named."""
        super().__init__(options, split=split, seed=seed)
        key, seeds = ("worlds", options.worlds) if split == "train" else ("eval_worlds", options.eval_worlds)
        if not seeds:
            raise ConfigError(f"task.{key} must name at least one seed, got none")
        self._worlds = tuple(make_world(each) for each in seeds)

    @property
    def worlds(self) -> tuple[World, ...]:
        """The worlds that questions are drawn from."""
        return self._worlds

    def walk(self, cursor: int) -> tuple[World, Walk]:
        """The world of question `cursor`, and the facts that lead to its answer."""
        world = self._worlds[cursor % len(self._worlds)]
        return world, world.draw_walk(np.random.default_rng([self.seed, world.seed, cursor]))

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
    """One document per fact, with the text `SUBJECT RELATION OBJECT .`"""
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
