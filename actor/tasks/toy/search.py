"""Exact search over one world in memory, for demonstrations, with the ranking of the retriever's `bow` encoder."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from protocol.types import Passage


class ExactSearch:
    """Ranks passages by the cosine of idf-weighted word counts; ties keep the order of the corpus.

    The weights are those of the retriever's bag-of-words encoder, ln((1 + n) / (1 + df)) + 1, so that
    demonstrations contain the same distractors as rollouts.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = tuple(passages)
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, passage in enumerate(self._passages):
            for word in passage.text.split():
                rows_of[word].append(row)
        count = len(self._passages)
        self._rows = {word: np.asarray(rows) for word, rows in rows_of.items()}
        self._idf = {word: math.log((1 + count) / (1 + len(set(rows)))) + 1 for word, rows in rows_of.items()}
        norms = np.zeros(count)
        for word, rows in self._rows.items():
            unique, counts = np.unique(rows, return_counts=True)
            norms[unique] += (counts * self._idf[word]) ** 2
        self._norms = np.sqrt(norms)

    def search(self, query: str, *, top_n: int) -> tuple[Passage, ...]:
        """The `top_n` closest passages, closest first."""
        scores = np.zeros(len(self._passages))
        for word in query.split():
            if word in self._rows:
                np.add.at(scores, self._rows[word], self._idf[word] ** 2)
        best = np.argsort(-scores / self._norms, kind="stable")[:top_n]
        return tuple(self._passages[row] for row in best)
