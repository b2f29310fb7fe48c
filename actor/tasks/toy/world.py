"""A random world of typed facts, and questions about chains of facts.

A world is generated from a seed: names of two syllables, and one fact for each entity and each relation of its kind.
The facts can be found only by searching, because each seed gives other names and other facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SYLLABLES: tuple[str, ...] = tuple(consonant + vowel for consonant in "bdfgklmprstz" for vowel in "aeiou")
"""60 syllables. They have no `n`, so that no name is `none`, the text of an empty memory."""

AVOIDED_NAMES = frozenset({"rape", "pedo", "dago", "lies", "side", "same", "like", "made", "take", "male", "time"})

RELATIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "founder": ("company", "person"),
        "headquarters": ("company", "city"),
        "birthplace": ("person", "city"),
        "employer": ("person", "company"),
        "spouse": ("person", "person"),
        "country": ("city", "country"),
        "mayor": ("city", "person"),
        "capital": ("country", "city"),
        "leader": ("country", "person"),
    }
)
"""relation -> (kind of its subject, kind of its object)."""

KIND_SIZES: Mapping[str, int] = MappingProxyType({"person": 400, "company": 200, "city": 200, "country": 60})
"""Number of entities of each kind. With RELATIONS, a world has 2,120 facts."""

MAX_HOPS = 3


@dataclass(frozen=True, slots=True)
class Fact:
    subject: str
    relation: str
    object: str


@dataclass(frozen=True, slots=True)
class Walk:
    """A question's chain of facts: `facts[k].object` is `facts[k + 1].subject`; the last object is the answer."""

    facts: tuple[Fact, ...]

    @property
    def start(self) -> str:
        return self.facts[0].subject

    @property
    def relations(self) -> tuple[str, ...]:
        return tuple(fact.relation for fact in self.facts)

    @property
    def answer(self) -> str:
        return self.facts[-1].object


@dataclass(frozen=True, slots=True)
class World:
    """`kinds`: name -> kind of each entity; `facts`: (subject, relation) -> fact, in the order of the corpus."""

    seed: int
    kinds: Mapping[str, str]
    facts: Mapping[tuple[str, str], Fact]

    @property
    def collection(self) -> str:
        """The name of the index that holds this world's documents."""
        return f"world-{self.seed}"

    def draw_walk(self, rng: np.random.Generator) -> Walk:
        """Draws a chain of 1 to MAX_HOPS facts (uniform) from a random entity; no relation occurs twice."""
        num_hops = int(rng.integers(1, MAX_HOPS + 1))
        entity = list(self.kinds)[int(rng.integers(len(self.kinds)))]
        walked: list[Fact] = []
        for _ in range(num_hops):
            taken = {fact.relation for fact in walked}
            open_relations = [r for r in relations_of(self.kinds[entity]) if r not in taken]
            relation = open_relations[int(rng.integers(len(open_relations)))]
            walked.append(self.facts[entity, relation])
            entity = walked[-1].object
        return Walk(facts=tuple(walked))


def relations_of(kind: str) -> tuple[str, ...]:
    """The relations that an entity of `kind` is the subject of. Every kind has at least two."""
    return tuple(relation for relation, (subject, _) in RELATIONS.items() if subject == kind)


def possible_names() -> tuple[str, ...]:
    return tuple(a + b for a, b in permutations(SYLLABLES, 2) if a + b not in AVOIDED_NAMES)


def make_world(seed: int) -> World:
    """Draws a world; the same seed gives the same world on every machine.

    Facts are drawn independently (a capital need not lie in its country), so that none can be inferred from another.
    Only spouses are drawn in mutual pairs: otherwise many people could have the same spouse. So at most two facts
    contain both words of a query, and the wanted fact is among the top 3, although the search ignores word order.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x70A1]))
    bounds = np.cumsum([0, *KIND_SIZES.values()])
    names = [str(name) for name in rng.permutation(possible_names())[: bounds[-1]]]
    members = {kind: names[a:b] for kind, (a, b) in zip(KIND_SIZES, pairwise(bounds), strict=True)}
    facts: dict[tuple[str, str], Fact] = {}
    for relation, (subject_kind, object_kind) in RELATIONS.items():
        subjects, others = members[subject_kind], members[object_kind]
        drawn = _couples(len(subjects), rng) if relation == "spouse" else rng.integers(len(others), size=len(subjects))
        for subject, index in zip(subjects, drawn, strict=True):
            facts[subject, relation] = Fact(subject, relation, others[index])
    kinds = {name: kind for kind, group in members.items() for name in group}
    return World(seed=seed, kinds=MappingProxyType(kinds), facts=MappingProxyType(facts))


def _couples(num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draws mutual pairs: int64 [num], the index of each one's partner. `num` must be even."""
    pairs = rng.permutation(num).reshape(-1, 2)
    partners = np.empty(num, dtype=np.int64)
    partners[pairs] = pairs[:, ::-1]
    return partners
