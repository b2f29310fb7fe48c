"""Exact search: a query is compared with every vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.config_base import Options
from protocol.errors import DataError
from retriever.structures.base import Neighbours, VectorIndex, best_k

VECTORS_FILE = "vectors.npy"
_CHUNK_ROWS = 8192


class FlatIndex(VectorIndex):
    """All vectors in one float32 array [num_rows, dimension], in the file vectors.npy."""

    def __init__(self, options: Options | None = None, *, dimension: int, num_threads: int = 1) -> None:
        self._vectors = np.empty((0, dimension), dtype=np.float32)
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def allocate(self, num_rows: int) -> None:
        self._vectors = np.empty((num_rows, self._vectors.shape[1]), dtype=np.float32)

    def add(self, vectors: NDArray[np.float32]) -> None:
        self._vectors[self._num_rows : self._num_rows + len(vectors)] = vectors
        self._num_rows += len(vectors)

    def search(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        return search_exact(self._chunks(), queries, min(k, len(self)))

    def save(self, folder: Path) -> tuple[str, ...]:
        np.save(folder / VECTORS_FILE, self._vectors[: self._num_rows])
        return (VECTORS_FILE,)

    def load(self, folder: Path) -> None:
        """Maps the file into memory. Raises: DataError if it is not a float32 array with rows of `dimension`."""
        path, dimension = folder / VECTORS_FILE, self._vectors.shape[1]
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}; build the index again") from None
        if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != dimension:
            raise DataError(
                f"{path}: expected float32 vectors of dimension {dimension}, found {vectors.dtype} of shape "
                f"{vectors.shape}; build the index again"
            )
        self._vectors, self._num_rows = vectors, len(vectors)

    def _chunks(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, self._num_rows, _CHUNK_ROWS):
            yield self._vectors[start : min(start + _CHUNK_ROWS, self._num_rows)]


def search_exact(chunks: Iterable[NDArray[np.float32]], queries: NDArray[np.float32], k: int) -> Neighbours:
    """The k rows closest to each query, by comparing with every vector; `chunks` hold rows 0, 1, … in order."""
    rows = np.empty((len(queries), 0), dtype=np.int64)
    scores = np.empty((len(queries), 0), dtype=np.float32)
    start = 0
    for vectors in chunks:
        found = np.broadcast_to(np.arange(start, start + len(vectors)), (len(queries), len(vectors)))
        best = best_k(np.hstack([rows, found]), np.hstack([scores, queries @ vectors.T]), k)
        rows, scores = best.rows, best.scores
        start += len(vectors)
    return Neighbours(rows, scores)
