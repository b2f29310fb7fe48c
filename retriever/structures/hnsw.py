"""Approximate search in an HNSW graph, with hnswlib."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import hnswlib
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from protocol.config_base import Options
from protocol.errors import DataError
from retriever.structures.base import Neighbours, VectorIndex, best_k
from retriever.structures.flat import search_exact

GRAPH_FILE = "graph.hnsw"
_CHUNK_ROWS = 8192


class HnswOptions(Options):
    """The graph's parameters (Malkov & Yashunin, arXiv 1603.09320): M links per node, and the two candidate lists."""

    m: Annotated[int, Field(ge=2, le=256)] = 32
    ef_construction: Annotated[int, Field(ge=8, le=4096)] = 200
    ef_search: Annotated[int, Field(ge=1, le=65_536)] = 128


class HnswIndex(VectorIndex):
    """One graph under the inner product, in the file graph.hnsw. With one thread, equal input gives an equal graph.

    hnswlib's `ef` is a setting of the graph, not of a query, so only one thread may search at a time.
    """

    Options = HnswOptions

    def __init__(self, options: HnswOptions, *, dimension: int, num_threads: int = 1) -> None:
        self._options = options
        self._num_threads = num_threads
        self._graph = hnswlib.Index(space="ip", dim=dimension)

    def __len__(self) -> int:
        return self._graph.element_count

    def allocate(self, num_rows: int) -> None:
        options = self._options
        self._graph.init_index(
            max_elements=num_rows, M=options.m, ef_construction=options.ef_construction, random_seed=100
        )
        self._graph.set_num_threads(self._num_threads)

    def add(self, vectors: NDArray[np.float32]) -> None:
        start = len(self)
        self._graph.add_items(vectors, np.arange(start, start + len(vectors)))

    def search(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        k = min(k, len(self))
        self._graph.set_ef(max(self._options.ef_search, k))
        try:
            labels, distances = self._graph.knn_query(queries, k=k)
        except RuntimeError:
            # hnswlib raises this if the part of the graph that it reached holds fewer than k passages.
            return search_exact(self._chunks(), queries, k)
        return best_k(labels.astype(np.int64), (1 - distances).astype(np.float32), k)

    def save(self, folder: Path) -> tuple[str, ...]:
        self._graph.save_index(str(folder / GRAPH_FILE))
        return (GRAPH_FILE,)

    def load(self, folder: Path) -> None:
        """Raises: DataError if hnswlib refuses the file."""
        try:
            self._graph.load_index(str(folder / GRAPH_FILE))
        except RuntimeError as error:
            raise DataError(f"hnswlib cannot read {folder / GRAPH_FILE}: {error}; build the index again") from None
        self._graph.set_num_threads(self._num_threads)

    def _chunks(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self), _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, len(self)))
            yield np.asarray(self._graph.get_items(rows), dtype=np.float32)
