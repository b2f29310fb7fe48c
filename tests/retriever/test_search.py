from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retriever.collection import Collection
from retriever.encoders.bow import BagOfWordsEncoder
from retriever.index_folder import load_index
from retriever.search import Query, Searcher


class CountingEncoder(BagOfWordsEncoder):
    encoded: list[str]

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        self.encoded = [*getattr(self, "encoded", []), *queries]
        return super().encode_queries(queries)


def searcher(folder: Path, *, cache_size: int) -> tuple[Searcher, CountingEncoder]:
    encoder = CountingEncoder()
    encoder.load_state(folder)
    return Searcher([Collection("fruit", load_index(folder), encoder)], cache_size=cache_size), encoder


def test_equal_queries_are_encoded_once(bow_index: Path) -> None:
    search, encoder = searcher(bow_index, cache_size=0)
    results = search.search([Query("apple", 1, ""), Query("pear", 2, ""), Query("apple", 1, "")])
    assert encoder.encoded == ["apple", "pear"]
    assert results[0] == results[2]
    assert [len(passages) for passages in results] == [1, 2, 1]


def test_the_cache_evicts_the_least_recently_used_query(bow_index: Path) -> None:
    search, encoder = searcher(bow_index, cache_size=2)
    first = search.search([Query("apple", 1, ""), Query("pear", 1, "")])
    assert search.search([Query("apple", 1, "")]) == first[:1]
    search.search([Query("tree", 1, "")])  # Evicts `pear`, the least recently used.
    search.search([Query("apple", 1, ""), Query("pear", 1, "")])
    assert encoder.encoded == ["apple", "pear", "tree", "pear"]
    assert search.num_cache_hits == 2
