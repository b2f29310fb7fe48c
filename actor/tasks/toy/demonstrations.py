"""Scripted episodes of the toy. The demonstrator gets the facts that lead to the answer, and makes random errors.

It replaces the policy in the MemSearcher workflow (actor/workflows/demonstrations.py). The errors are intended:
reinforcement learning can remove them, and without them it would have nothing to improve.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actor.chat.rendering import Rendering
from actor.chat.tokenizer import Tokenizer
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.session import Session
from actor.tasks.toy.search import ExactSearch
from actor.tasks.toy.task import ToyOptions, ToyTask, documents
from actor.tasks.toy.tokenizer import syllable_ids, symbol_ids
from actor.tasks.toy.world import RELATIONS, Fact, Walk, World
from actor.tools.search import SearchOptions, SearchTool
from actor.tools.tool import Services
from actor.workflows.demonstrations import ScriptedGenerator, save_demonstrations
from actor.workflows.memsearcher import MemSearcher, MemSearcherOptions
from protocol.types import Context, Passage

# Scripted pieces are much shorter than these limits.
_OPTIONS = MemSearcherOptions(rendering="toy", max_turns=5, action_tokens=32, memory_tokens=32)
_CONTEXT_TOKENS = 256
_TOP_N = 3


@dataclass(frozen=True, slots=True)
class Noise:
    """Probability of each error, drawn once per turn in which it is possible."""

    answer_early: float = 0.15
    wrong_relation: float = 0.15
    wrong_entity: float = 0.15
    stale_memory: float = 0.15


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A scripted episode of one question."""

    walk: Walk
    episode: Episode
    contexts: tuple[Context, ...]


class Demonstrator:
    """Implements `Script` for one question: it writes actions and memories alternately.

    It reads only the passages from its context. The question's facts and the remembered fact are attributes.
    """

    def __init__(
        self, *, world: World, walk: Walk, rendering: Rendering, noise: Noise, rng: np.random.Generator
    ) -> None:
        self._world = world
        self._walk = walk
        self._rendering = rendering
        self._noise = noise
        self._rng = rng
        self._memory: Fact | None = None
        self._asked: tuple[str, str] | None = None

    def write(self, context: str) -> str:
        if self._asked is None:
            return self._act()
        asked, self._asked = self._asked, None
        if self._rng.random() >= self._noise.stale_memory:
            self._memory = _fact_found(_facts_in(context), *asked, self._rng)
        return self._rendering.write_memory(_written(self._memory) or "none")

    def _act(self) -> str:
        memory, walk = self._memory, self._walk
        relation = _next_relation(walk, memory)
        known = memory.object if memory else walk.start
        anchor = memory.relation if memory else walk.start
        if memory and (relation is None or self._rng.random() < self._noise.answer_early):
            return self._rendering.write_answer(f"{anchor} ?", known)
        entity, relation = self._asked = self._draw_errors(known, relation or walk.relations[0])
        return self._rendering.write_action_search(f"{anchor} {relation}", [f"{entity} {relation}"])

    def _draw_errors(self, entity: str, relation: str) -> tuple[str, str]:
        if self._rng.random() < self._noise.wrong_relation:
            relation = str(self._rng.choice([other for other in RELATIONS if other != relation]))
        if self._rng.random() < self._noise.wrong_entity:
            names = tuple(self._world.kinds)
            entity = names[int(self._rng.integers(len(names)))]
        return entity, relation


class WorldSearch:
    """Implements `Searcher` on worlds in memory."""

    def __init__(self, worlds: Sequence[World]) -> None:
        self._worlds = {world.collection: ExactSearch(documents(world)) for world in worlds}

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        return [list(self._worlds[collection].search(query, top_n=top_n)) for query in queries]


async def demonstrate(
    worlds: Sequence[int],
    *,
    tokenizer: Tokenizer,
    num_episodes: int,
    seed: int,
    noise: Noise | None = None,
) -> AsyncIterator[Demonstration]:
    """Yields scripted episodes. The questions rotate over the worlds, which are given by their seeds."""
    rng = np.random.default_rng([seed, 0xDE40])
    task = ToyTask(ToyOptions(worlds=tuple(worlds)), split="train", seed=seed)
    search = SearchTool(SearchOptions(top_n=_TOP_N), services=Services(searcher=WorldSearch(task.worlds)))
    workflow = MemSearcher(_OPTIONS, tools={"search": search}, context_tokens=_CONTEXT_TOKENS)
    for cursor in range(num_episodes):
        world, walk = task.walk(cursor)
        question = task.question(cursor)
        script = Demonstrator(world=world, walk=walk, rendering=workflow.rendering, noise=noise or Noise(), rng=rng)
        session = Session(
            pool=ScriptedGenerator(script=script, tokenizer=tokenizer),
            tokenizer=tokenizer,
            sampling=SamplingParams(),
            run_id=None,
            max_context_tokens=_CONTEXT_TOKENS,
            question=question,
        )
        episode = await workflow.run(question, session)
        yield Demonstration(walk, episode, session.contexts)


def write_demonstrations(
    path: Path,
    worlds: Sequence[int],
    *,
    tokenizer: Tokenizer,
    num_episodes: int = 4000,
    seed: int,
    noise: Noise | None = None,
) -> float:
    """Saves the contexts of `demonstrate` (`save_demonstrations`); returns the fraction of correct answers.

    metadata: the ranges of ids `symbols` and `permutable`, as `start:stop`. Must not be called in an event loop.
    """

    async def collect() -> list[Demonstration]:
        episodes = demonstrate(worlds, tokenizer=tokenizer, num_episodes=num_episodes, seed=seed, noise=noise)
        return [played async for played in episodes]

    demonstrations = asyncio.run(collect())
    ranges = {"symbols": symbol_ids(), "permutable": syllable_ids()}
    save_demonstrations(
        path,
        [context for played in demonstrations for context in played.contexts],
        metadata={name: f"{ids.start}:{ids.stop}" for name, ids in ranges.items()},
    )
    return float(np.mean([played.episode.answer == played.walk.answer for played in demonstrations]))


def _written(memory: Fact | None) -> str:
    return f"{memory.subject} {memory.relation} {memory.object}" if memory else ""


def _next_relation(walk: Walk, memory: Fact | None) -> str | None:
    """The relation to look up next; None if the memory has the fact of the question's last relation."""
    if memory is None or memory.relation not in walk.relations:
        return walk.relations[0]
    place = walk.relations.index(memory.relation) + 1
    return walk.relations[place] if place < len(walk.relations) else None


def _facts_in(context: str) -> list[Fact]:
    """The facts in the context's observation, in the order shown."""
    _, _, observation = context.rpartition("<information>")
    words = observation.split()
    return [Fact(*words[end - 3 : end]) for end, word in enumerate(words) if word == "."]


def _fact_found(facts: Sequence[Fact], entity: str, relation: str, rng: np.random.Generator) -> Fact:
    """The fact with this entity and relation; if there is none, a random one of `facts`."""
    for fact in facts:
        if (fact.subject, fact.relation) == (entity, relation):
            return fact
    return facts[int(rng.integers(len(facts)))]
