"""An index folder: vectors to search, and the passages in the order of the vectors' rows.

manifest.json     encoder, index structure, metric, count, checksums
graph.hnsw        written by the structure `hnsw`, a graph whose labels are rows; `flat` writes vectors.npy; a user's
                  own structure writes its own files
passages.jsonl    the passages by row, with offsets.npy
bow.json          the vocabulary of the encoder `bow`; a user's own encoder writes its own files, or none
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DataError
from retriever.corpus import PassageTable
from retriever.extensions import reopen_structure
from retriever.manifest import IndexManifest, check_files, read_manifest
from retriever.structures.base import VectorIndex


@dataclass(frozen=True, slots=True)
class LoadedIndex:
    """An opened index folder whose files match its manifest."""

    folder: Path
    manifest: IndexManifest
    vectors: VectorIndex
    passages: PassageTable


def load_index(folder: Path, *, ef_search: int | None = None, num_threads: int = 1) -> LoadedIndex:
    """Opens an index folder; `ef_search` replaces the manifest's.

    Raises: DataError if a file is missing or damaged, or its count or dimension differs from the manifest's;
    ConfigError if the user's own index structure cannot be imported.
    """
    manifest = read_manifest(folder)
    check_files(manifest, folder)
    vectors = reopen_structure(
        manifest.structure,
        index_folder=folder,
        dimension=manifest.encoder.dimension,
        ef_search=ef_search,
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
