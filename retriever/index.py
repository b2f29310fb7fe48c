"""An index folder: vectors to search, and the passages that their rows stand for.

manifest.json     encoder, metric, count, parameters, checksums
graph.hnsw        hnswlib's file, labels are rows; or vectors.npy where every vector is compared
passages.jsonl    the passages by row, with offsets.npy
bow.json          the bag-of-words encoder's vocabulary, where it is used
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DataError
from retriever.corpus import PassageTable
from retriever.hnsw import HnswIndex
from retriever.manifest import IndexManifest, check_files, read_manifest
from retriever.nearest import FlatIndex, VectorIndex

GRAPH_FILE = "graph.hnsw"
VECTORS_FILE = "vectors.npy"


@dataclass(frozen=True, slots=True)
class LoadedIndex:
    """An index folder that agrees with its manifest."""

    folder: Path
    manifest: IndexManifest
    vectors: VectorIndex
    passages: PassageTable


def load_index(folder: Path, *, ef_search: int | None = None, num_threads: int = 1) -> LoadedIndex:
    """Opens an index folder; `ef_search` replaces the manifest's.

    Raises: DataError where a file is missing, damaged, or has not the count or dimension that the manifest states.
    """
    manifest = read_manifest(folder)
    check_files(manifest, folder)
    dimension = manifest.encoder.dimension
    vectors: VectorIndex
    if manifest.hnsw is None:
        vectors = FlatIndex.read(folder / VECTORS_FILE, dimension=dimension)
    else:
        vectors = HnswIndex.read(
            folder / GRAPH_FILE,
            dimension=dimension,
            ef_search=ef_search or manifest.hnsw.ef_search,
            num_threads=num_threads,
        )
    passages = PassageTable(folder)
    for name, found in (("vectors", len(vectors)), ("passages", len(passages))):
        if found != manifest.num_passages:
            raise DataError(
                f"index {folder}: num_passages expected {manifest.num_passages}, found {found} {name}; "
                "build the index again"
            )
    return LoadedIndex(folder, manifest, vectors, passages)
