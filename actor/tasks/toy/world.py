"""A made-up world of typed facts, and the questions that walk through it.

A world is drawn from a seed: names of two syllables, and for every entity one object a relation that its kind has.
Nothing about a world can be known but by searching it, and another seed gives other names and other facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SYLLABLES: tuple[str, ...] = tuple(consonant + vowel for consonant in "bdfgklmprstz" for vowel in "aeiou")
"""60 of them. No `n`, so that no name spells `none`, which stands for an empty memory."""

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
"""With RELATIONS this makes 2,120 facts."""

MAX_HOPS = 3


@dataclass(frozen=True, slots=True)
class Fact:
    subject: str
    relation: str
    object: str


@dataclass(frozen=True, slots=True)
class Walk:
    """A question's way: `facts[k].object` is `facts[k + 1].subject`, the last object is the answer."""

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
        """Draws 1 to MAX_HOPS hops uniformly, from any entity, with no relation twice."""
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

    Facts are independent draws (a capital need not lie in its country), so that none can be inferred from another.
    Spouses alone are mutual: then no more than two facts have both words of a query, so that the one asked for is
    always among the top 3, even for a search that is blind to the order of words.
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
    """int64 [num], `num` even: the partner of each; everyone is the partner of their partner."""
    pairs = rng.permutation(num).reshape(-1, 2)
    partners = np.empty(num, dtype=np.int64)
    partners[pairs] = pairs[:, ::-1]
    return partners
