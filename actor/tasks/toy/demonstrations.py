"""Scripted episodes of the toy: a demonstrator that knows the way, and errs on purpose.

It plays the MemSearcher workflow turn by turn in the workflow's own rendering. The errors are what reinforcement
learning has to remove: a demonstrator that never errs would leave it nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from actor.rewards.reward import ExactMatchReward
from actor.tasks.toy.search import ExactSearch
from actor.tasks.toy.task import ToyQuestions, documents, question_text
from actor.tasks.toy.tokenizer import build_tokenizer, syllable_ids, symbol_ids
from actor.tasks.toy.world import RELATIONS, Fact, Walk, World
from actor.workflows.rendering import Rendering, Result, Search
from protocol.types import Passage


@dataclass(frozen=True, slots=True)
class Noise:
    """Probability of each error, drawn once a turn in which it can be made."""

    answer_early: float = 0.15
    wrong_relation: float = 0.15
    wrong_entity: float = 0.15
    stale_memory: float = 0.15


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a context's text; `sampled` where the policy wrote it."""

    text: str
    sampled: bool


@dataclass(frozen=True, slots=True)
class ScriptedEpisode:
    """`contexts` are lists of pieces as a session would record them; `answer` is None where turns ran out."""

    contexts: tuple[tuple[Piece, ...], ...]
    answer: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrator:
    """Plays questions about one world, with the budgets of the workflow."""

    world: World
    search: ExactSearch
    rendering: Rendering
    noise: Noise = Noise()
    max_turns: int = 5
    top_n: int = 3

    def play(self, walk: Walk, rng: np.random.Generator) -> ScriptedEpisode:
        """Plays one question to its answer, or to a last search that has no turn left to use it."""
        memory: Fact | None = None
        contexts: list[tuple[Piece, ...]] = []
        for turn in range(self.max_turns):
            prompt = Piece(self.rendering.prompt(question_text(walk), _written(memory)), sampled=False)
            relation = _next_relation(walk, memory)
            known = memory.object if memory else walk.start
            anchor = memory.relation if memory else walk.start
            if memory and (relation is None or rng.random() < self.noise.answer_early):
                action = self.rendering.write_answer(f"{anchor} ?", known)
                contexts.append((prompt, Piece(action, sampled=True)))
                return ScriptedEpisode(tuple(contexts), known)
            entity, relation = self._slip(known, relation or walk.relations[0], rng)
            query = f"{entity} {relation}"
            action = self.rendering.write_action_search(f"{anchor} {relation}", [query])
            if turn == self.max_turns - 1:
                contexts.append((prompt, Piece(action, sampled=True)))
                break
            found = self.search.search(query, top_n=self.top_n)
            if rng.random() >= self.noise.stale_memory:
                memory = _fact_found(found, entity, relation, rng)
            contexts.append(
                (
                    prompt,
                    Piece(action, sampled=True),
                    Piece(self.rendering.observation([Result(Search(query), found)]), sampled=False),
                    Piece(self.rendering.write_memory(_written(memory) or "none"), sampled=True),
                )
            )
        return ScriptedEpisode(tuple(contexts), None)

    def _slip(self, entity: str, relation: str, rng: np.random.Generator) -> tuple[str, str]:
        if rng.random() < self.noise.wrong_relation:
            relation = str(rng.choice([other for other in RELATIONS if other != relation]))
        if rng.random() < self.noise.wrong_entity:
            names = tuple(self.world.kinds)
            entity = names[int(rng.integers(len(names)))]
        return entity, relation


def demonstrate(
    worlds: Sequence[World], *, rendering: Rendering, num_episodes: int, seed: int, noise: Noise | None = None
) -> Iterator[tuple[Walk, ScriptedEpisode]]:
    """Episodes on questions that rotate over the worlds."""
    rng = np.random.default_rng([seed, 0xDE40])
    questions = ToyQuestions(worlds, reward=ExactMatchReward(), seed=seed)
    players = {
        world.seed: Demonstrator(
            world=world, search=ExactSearch(documents(world)), rendering=rendering, noise=noise or Noise()
        )
        for world in worlds
    }
    for cursor in range(num_episodes):
        world, walk = questions.walk(cursor)
        yield walk, players[world.seed].play(walk, rng)


def write_demonstrations(
    path: Path,
    worlds: Sequence[World],
    *,
    rendering: Rendering,
    num_episodes: int = 4000,
    seed: int,
    noise: Noise | None = None,
) -> float:
    """Writes the contexts of `demonstrate` as the arrays that learner/sft.py reads; returns the share answered right.

    safetensors: token_ids int32 [N], loss_mask bool [N], offsets int64 [C + 1] with context c at
    [offsets[c], offsets[c + 1]); metadata: the ranges of ids `symbols` and `permutable`, as `start:stop`.
    """
    tokenizer = build_tokenizer()
    contexts: list[tuple[Piece, ...]] = []
    num_right = 0
    for walk, episode in demonstrate(worlds, rendering=rendering, num_episodes=num_episodes, seed=seed, noise=noise):
        contexts += episode.contexts
        num_right += episode.answer == walk.answer
    path.parent.mkdir(parents=True, exist_ok=True)
    ranges = {"symbols": symbol_ids(), "permutable": syllable_ids()}
    metadata = {name: f"{ids.start}:{ids.stop}" for name, ids in ranges.items()}
    save_file(_columns(contexts, tokenizer), path, metadata=metadata)
    return num_right / max(1, num_episodes)


def _columns(contexts: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Each piece is encoded alone, as a session does, so that the tokens are those that a policy would sample."""
    pieces = [piece for context in contexts for piece in context]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([piece.text for piece in pieces])]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first_pieces = np.concatenate([[0], np.cumsum([len(context) for context in contexts])]).astype(np.int64)
    return {
        "token_ids": np.fromiter((token for ids in encoded for token in ids), dtype=np.int32, count=int(starts[-1])),
        "loss_mask": np.repeat(np.array([piece.sampled for piece in pieces], dtype=np.bool_), lengths),
        "offsets": starts[first_pieces].astype(np.int64),
    }


def _written(memory: Fact | None) -> str:
    return f"{memory.subject} {memory.relation} {memory.object}" if memory else ""


def _next_relation(walk: Walk, memory: Fact | None) -> str | None:
    """The relation to look up; None when the question's last one is in memory."""
    if memory is None or memory.relation not in walk.relations:
        return walk.relations[0]
    place = walk.relations.index(memory.relation) + 1
    return walk.relations[place] if place < len(walk.relations) else None


def _fact_found(found: Sequence[Passage], entity: str, relation: str, rng: np.random.Generator) -> Fact:
    """The fact that was asked for; where no passage states it, one that was found."""
    facts = [_fact(passage) for passage in found]
    for fact in facts:
        if (fact.subject, fact.relation) == (entity, relation):
            return fact
    return facts[int(rng.integers(len(facts)))]


def _fact(passage: Passage) -> Fact:
    subject, relation, obj, *_ = passage.text.split()
    return Fact(subject, relation, obj)
