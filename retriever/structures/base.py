"""The base class of index structures, which find the vectors closest to a query, and the type of their results.

Two structures are built in. `HnswIndex` walks a graph: for dense vectors in any number. `FlatIndex` compares with
every vector: for vectors on which a graph walk fails. With bag-of-words vectors nearly all cosines are equal or
zero, so a walk has no gradient to follow: on 2,120 toy documents, recall@3 was 0.53 to 0.71 with hnswlib and 0.998 with
FlatIndex.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue

from protocol.config_base import Options

_SCORE_STEP = 1e-5


class StructureSpec(BaseModel):
    """An index structure in an index's manifest: a built-in name or an import path, and the validated options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: str
    options: dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The closest rows of n queries, best first; scores that agree to 1e-5 are ordered by row.

    rows    int64   [n, k]
    scores  float32 [n, k]  cosine
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class VectorIndex(ABC):
    """Vectors of unit length in rows 0, 1, … in the order of `add`.

    palimpsest index      VectorIndex(options, dimension=…, …) ─► allocate(num_rows) ─► add … ─► save(folder)
    palimpsest retriever  VectorIndex(options, dimension=…, …) ─► load(folder) ─► search …

    A subclass may define a class attribute `Options`, a subclass of `protocol.config_base.Options`: the options that
    its constructor gets. One thread uses it at a time.
    """

    @abstractmethod
    def __init__(self, options: Options, *, dimension: int, num_threads: int) -> None: ...

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    def allocate(self, num_rows: int) -> None:
        """Prepares an empty index for `num_rows` rows. Called once, before `add`."""

    @abstractmethod
    def add(self, vectors: NDArray[np.float32]) -> None:
        """Appends the rows of [n, dimension], which have unit length."""

    @abstractmethod
    def search(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        """The min(k, len(self)) closest rows to each of the queries [n, dimension]."""

    @abstractmethod
    def save(self, folder: Path) -> tuple[str, ...]:
        """Writes the index into files of `folder`; returns the names of the files."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises: DataError if it cannot."""


def best_k(rows: NDArray[np.int64], scores: NDArray[np.float32], k: int) -> Neighbours:
    """The k best of the m candidates of each query: rows [n, m] with their scores [n, m].

    Scores are rounded before they are compared, so that the order of ties does not depend on the composition of a
    batch: BLAS rounds differently for different shapes.
    """
    # One unique integer per candidate, smaller for better: sorting the integers orders by score and then by row.
    keys = np.rint(scores / -_SCORE_STEP).astype(np.int64) * (1 << 40) + rows
    if k < keys.shape[1]:
        kept = np.argpartition(keys, k - 1, axis=1)[:, :k]
        keys, rows, scores = (np.take_along_axis(array, kept, axis=1) for array in (keys, rows, scores))
    order = np.argsort(keys, axis=1)
    return Neighbours(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))
