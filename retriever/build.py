"""corpus ─▶ passages by row ─▶ vectors (encoded, or ready ones) ─▶ graph ─▶ manifest ─▶ renamed into place.

Everything is written in a folder beside the final one, which appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.errors import DataError
from retriever.corpus import OFFSETS_FILE, PASSAGES_FILE, PassageTable, read_corpus, write_passages
from retriever.encoders.base import Encoder, normalise
from retriever.hnsw import HnswIndex
from retriever.index import GRAPH_FILE, VECTORS_FILE
from retriever.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    HnswSettings,
    IndexManifest,
    checksums,
    write_manifest,
)
from retriever.nearest import FlatIndex, VectorIndex

Progress = Callable[[int, int], None]
"""Called with (passages done, passages in all)."""

_SAMPLE_SIZE = 4
_MIN_COSINE = 0.98


def build_index(
    *,
    corpus: Path,
    out: Path,
    make_encoder: Callable[[PassageTable], Encoder],
    hnsw: HnswSettings | None,
    vectors: Path | None = None,
    chunk_size: int = 256,
    num_threads: int = 1,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> IndexManifest:
    """Indexes `corpus` into the folder `out`.

    `make_encoder` gets the passages, which the bag of words is fitted on. `hnsw` None keeps the
    vectors as they are, to be compared one by one. `vectors` is an .npz with `ids` [n] and
    `vectors` [n, dimension] made by the same encoder: a few passages are encoded to check that.

    Raises: DataError where the corpus or the vectors cannot be used, or `out` exists and `force` is not given.
    """
    if out.exists():
        _check_replaceable(out, force=force)
    with _staged(out) as folder:
        num_passages = write_passages(read_corpus(corpus), folder)
        passages = PassageTable(folder)
        encoder = make_encoder(passages)
        ready = read_vectors(vectors, passages, encoder) if vectors is not None else None
        index = _empty_index(encoder.spec.dimension, num_passages, hnsw, num_threads=num_threads)
        for start in range(0, num_passages, chunk_size):
            stop = min(start + chunk_size, num_passages)
            if ready is not None:
                index.add(ready[start:stop])
            else:
                index.add(encoder.encode_passages([passages[row] for row in range(start, stop)]))
            progress(stop, num_passages)
        vector_file = VECTORS_FILE if hnsw is None else GRAPH_FILE
        index.write(folder / vector_file)
        passages.close()
        files = (vector_file, PASSAGES_FILE, OFFSETS_FILE, *encoder.save_state(folder))
        manifest = IndexManifest(
            format_version=FORMAT_VERSION,
            encoder=encoder.spec,
            metric="inner_product",
            num_passages=num_passages,
            hnsw=hnsw,
            sha256=checksums(folder, files),
        )
        write_manifest(manifest, folder)
    return manifest


def _empty_index(dimension: int, capacity: int, hnsw: HnswSettings | None, *, num_threads: int) -> VectorIndex:
    if hnsw is None:
        return FlatIndex.create(dimension=dimension, capacity=capacity)
    return HnswIndex.create(dimension=dimension, capacity=capacity, settings=hnsw, num_threads=num_threads)


def read_vectors(path: Path, passages: PassageTable, encoder: Encoder) -> NDArray[np.float32]:
    """The vectors of an .npz in the order of `passages`: float32 [n, dimension], of unit length.

    Raises: DataError where the file cannot be read, its ids are not the corpus's, its shape does not fit, a value is
    not finite, or the encoder makes other vectors of the same passages.
    """
    ids, vectors = _read_npz(path)
    expected = (len(ids), encoder.spec.dimension)
    if vectors.shape != expected:
        raise DataError(
            f"{path}: vectors expected shape {expected} (ids x dimension of {encoder.spec.source}), "
            f"found {vectors.shape}; give the vectors that this encoder made"
        )
    row_of_id = {str(passage_id): row for row, passage_id in enumerate(ids)}
    if len(row_of_id) != len(ids):
        raise DataError(f"{path}: {len(ids) - len(row_of_id)} ids occur twice; ids must be unique")
    corpus_ids = [passage.id for passage in passages]
    missing = [passage_id for passage_id in corpus_ids if passage_id not in row_of_id]
    if missing or len(ids) != len(corpus_ids):
        raise DataError(
            f"{path}: ids expected the corpus's {len(corpus_ids)}, found {len(ids)}, "
            f"{len(missing)} passages without a vector{f' (first {missing[0]!r})' if missing else ''}; "
            "give the vectors of this very corpus"
        )
    ordered = vectors[[row_of_id[passage_id] for passage_id in corpus_ids]].astype(np.float32)
    norms = np.linalg.norm(ordered, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        bad = int(np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[0])
        raise DataError(f"{path}: the vector of passage {corpus_ids[bad]!r} is not finite or zero; encode again")
    ordered = normalise(ordered)
    _check_made_by(encoder, ordered, passages, path=path)
    return ordered


def _read_npz(path: Path) -> tuple[NDArray[np.str_], NDArray[np.floating]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["ids"], file["vectors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error}; give an .npz with arrays `ids` and `vectors`") from None


def _check_made_by(encoder: Encoder, vectors: NDArray[np.float32], passages: PassageTable, *, path: Path) -> None:
    rows = np.unique(np.linspace(0, len(passages) - 1, _SAMPLE_SIZE).astype(int))
    again = encoder.encode_passages([passages[int(row)] for row in rows])
    cosines = (again * vectors[rows]).sum(axis=1)
    worst = int(cosines.argmin())
    if cosines[worst] < _MIN_COSINE:
        passage = passages[int(rows[worst])]
        raise DataError(
            f"{path}: the vector of passage {passage.id!r} expected cosine >= {_MIN_COSINE} with what the encoder "
            f"{encoder.spec.source} makes of it, found {cosines[worst]:.3f}; give vectors made with these settings"
        )


def _check_replaceable(out: Path, *, force: bool) -> None:
    if not force:
        raise DataError(f"{out} exists; give another --out, or --force to replace an index there")
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(f"{out} exists and is no index, so --force does not replace it; give another --out")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or is removed where the body raises."""
    out = out.resolve()
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # A killed build's, whose process id came round again.
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot write beside {out}: {error.strerror or error}; give another --out") from None
    try:
        yield folder
        _sync(folder)
        if out.exists():
            out.rename(replaced)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
