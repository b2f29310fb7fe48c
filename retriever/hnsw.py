"""hnswlib behind the `VectorIndex` seam."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hnswlib
import numpy as np
from numpy.typing import NDArray

from protocol.errors import DataError
from retriever.manifest import HnswSettings
from retriever.nearest import Neighbours, search_exact, top

_CHUNK_ROWS = 8192


class HnswIndex:
    """One graph under the inner product. Its `ef` belongs to the graph and not to a query: one thread at a time."""

    def __init__(self, graph: hnswlib.Index, *, ef_search: int, num_threads: int = 1) -> None:
        self._graph = graph
        self._ef_search = ef_search
        graph.set_num_threads(num_threads)

    @classmethod
    def create(cls, *, dimension: int, capacity: int, settings: HnswSettings, num_threads: int = 1) -> HnswIndex:
        """An empty graph. With one thread, equal input gives an equal graph."""
        graph = hnswlib.Index(space="ip", dim=dimension)
        graph.init_index(max_elements=capacity, M=settings.m, ef_construction=settings.ef_construction, random_seed=100)
        return cls(graph, ef_search=settings.ef_search, num_threads=num_threads)

    @classmethod
    def read(cls, path: Path, *, dimension: int, ef_search: int, num_threads: int = 1) -> HnswIndex:
        """Raises: DataError where hnswlib refuses the file."""
        graph = hnswlib.Index(space="ip", dim=dimension)
        try:
            graph.load_index(str(path))
        except RuntimeError as error:
            raise DataError(f"hnswlib cannot read {path}: {error}; build the index again") from None
        return cls(graph, ef_search=ef_search, num_threads=num_threads)

    def __len__(self) -> int:
        return self._graph.get_current_count()

    def add(self, vectors: NDArray[np.float32]) -> None:
        start = len(self)
        self._graph.add_items(vectors, np.arange(start, start + len(vectors)))

    def write(self, path: Path) -> None:
        self._graph.save_index(str(path))

    def search(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        k = min(k, len(self))
        self._graph.set_ef(max(self._ef_search, k))
        try:
            labels, distances = self._graph.knn_query(queries, k=k)
        except RuntimeError:
            # What hnswlib raises where the part of the graph that it reached holds fewer than k passages.
            return search_exact(self._chunks(), queries, k)
        return top(labels.astype(np.int64), (1 - distances).astype(np.float32), k)

    def _chunks(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self), _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, len(self)))
            yield np.asarray(self._graph.get_items(rows), dtype=np.float32)
