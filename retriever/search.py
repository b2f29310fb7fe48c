"""Answers a batch of queries. Queries with equal text, `top_n` and collection are encoded and looked up once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.search_messages import PassageFields
from retriever.collection import Collection


@dataclass(frozen=True, slots=True)
class Query:
    text: str
    top_n: int
    collection: str


@dataclass(frozen=True, slots=True)
class _Hits:
    """rows int64 [n], scores float32 [n]. The passages are read from the file for each reply."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class Searcher:
    """Searches several collections and caches the latest results. Not thread-safe.

    The cache helps because the episodes of a group often send the same queries. It holds rows and scores, a few
    hundred bytes per query.
    """

    def __init__(self, collections: Sequence[Collection], *, cache_size: int = 16_384) -> None:
        """The first collection also has the name "" (the default)."""
        self._collections = {collection.name: collection for collection in collections}
        self._collections[""] = collections[0]
        self._cache: OrderedDict[Query, _Hits] = OrderedDict()
        self._cache_size = cache_size
        self.num_cache_hits = 0

    def has(self, collection: str) -> bool:
        return collection in self._collections

    @property
    def names(self) -> list[str]:
        return [name for name in self._collections if name]

    def search(self, queries: Sequence[Query]) -> list[list[PassageFields]]:
        """The passages of each query, best first; the queries keep their order."""
        hits: dict[Query, _Hits] = {}
        unknown: dict[tuple[str, int], list[Query]] = {}
        for query in dict.fromkeys(queries):
            cached = self._cache.get(query)
            if cached is None:
                unknown.setdefault((query.collection, query.top_n), []).append(query)
            else:
                self._cache.move_to_end(query)
                self.num_cache_hits += 1
                hits[query] = cached
        for (collection, top_n), group in unknown.items():
            hits.update(self._look_up(self._collections[collection], group, top_n))
        return [self._passages(query.collection, hits[query]) for query in queries]

    def _look_up(self, collection: Collection, queries: Sequence[Query], top_n: int) -> dict[Query, _Hits]:
        vectors = collection.encoder.encode_queries([query.text for query in queries])
        found = collection.index.vectors.search(vectors, top_n)
        hits = {query: _Hits(found.rows[i], found.scores[i]) for i, query in enumerate(queries)}
        self._cache.update(hits)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return hits

    def _passages(self, collection: str, hits: _Hits) -> list[PassageFields]:
        table = self._collections[collection].index.passages
        passages = ((table[int(row)], float(score)) for row, score in zip(hits.rows, hits.scores, strict=True))
        return [PassageFields(id=p.id, title=p.title, text=p.text, score=score) for p, score in passages]
