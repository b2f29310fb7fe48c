"""Builds an index folder from a corpus.

    corpus ─► passages by row ─► vectors (encoded here, or read from a file) ─► index structure ─► manifest

The files are written into a temporary folder beside the final one, which is renamed when it is complete.
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

from protocol.atomic_write import atomic_path
from protocol.config_base import ExtensionSection
from protocol.errors import DataError
from retriever.corpus import OFFSETS_FILE, PASSAGES_FILE, PassageTable, read_corpus, write_passages
from retriever.encoders.base import Compute, Encoder, EncoderSpec, normalise
from retriever.extensions import (
    ENCODERS,
    STRUCTURES,
    create_encoder,
    create_structure,
    running,
    spec_of,
    with_all_options,
)
from retriever.manifest import FORMAT_VERSION, MANIFEST_FILE, IndexManifest, checksums, write_manifest
from retriever.structures.base import StructureSpec

Progress = Callable[[int, int], None]
"""Called with (passages done, passages in all)."""

_SAMPLE_SIZE = 4
_MIN_COSINE = 0.98
_MAX_NORM_ERROR = 0.01


def build_index(
    *,
    corpus: Path,
    out: Path,
    encoder: ExtensionSection,
    structure: ExtensionSection,
    vectors: Path | None = None,
    chunk_size: int = 256,
    compute: Compute | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> IndexManifest:
    """Indexes `corpus` into the folder `out`.

    `encoder` and `structure` are made by `encoder_section` and `structure_section`. `vectors` is an .npz with `ids`
    [n] and `vectors` [n, dimension] made by the same encoder: a few passages are encoded again to check that.

    Raises: DataError if the corpus, the encoder's model or the vectors cannot be used, or `out` exists and `force` is
    false; ConfigError if the encoder or the structure cannot be imported, lacks a method or refuses an option.
    """
    compute = compute or Compute()
    encoder, structure = with_all_options(ENCODERS, encoder), with_all_options(STRUCTURES, structure)
    if out.exists():
        _check_replaceable(out, force=force)
    model = create_encoder(encoder, compute=compute)
    with _staged(out) as folder:
        num_passages = write_passages(read_corpus(corpus), folder)
        passages = PassageTable(folder)
        with running(ENCODERS, encoder.use):
            model.fit(passages)
            spec = spec_of(encoder, model)
        if vectors is None:
            chunks = _encode_chunks(model, passages, spec=spec, chunk_size=chunk_size)
        else:
            chunks = _slice_chunks(read_vectors(vectors, passages, model, source=spec.source), chunk_size=chunk_size)
        index = create_structure(structure, dimension=spec.dimension, num_threads=compute.num_threads)
        with running(STRUCTURES, structure.use):
            index.allocate(num_passages)
        for chunk in chunks:
            with running(STRUCTURES, structure.use):
                index.add(chunk)
            progress(len(index), num_passages)
        files = [PASSAGES_FILE, OFFSETS_FILE]
        with running(STRUCTURES, structure.use):
            files += index.save(folder)
        with running(ENCODERS, encoder.use):
            files += model.save_state(folder)
        passages.close()
        manifest = IndexManifest(
            format_version=FORMAT_VERSION,
            encoder=spec,
            metric="inner_product",
            num_passages=num_passages,
            structure=StructureSpec(use=structure.use, options=structure.options),
            sha256=checksums(folder, files),
        )
        write_manifest(manifest, folder)
    return manifest


def _slice_chunks(vectors: NDArray[np.float32], *, chunk_size: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(vectors), chunk_size):
        yield vectors[start : start + chunk_size]


def _encode_chunks(
    encoder: Encoder, passages: PassageTable, *, spec: EncoderSpec, chunk_size: int
) -> Iterator[NDArray[np.float32]]:
    """Encodes all passages; yields float32 [chunk_size, dimension].

    Raises: DataError if the shape, the dtype or the length of the encoder's vectors is wrong.
    """
    for start in range(0, len(passages), chunk_size):
        rows = range(start, min(start + chunk_size, len(passages)))
        with running(ENCODERS, spec.use):
            vectors = encoder.encode_passages([passages[row] for row in rows])
        expected, found = (len(rows), spec.dimension), (vectors.shape, str(vectors.dtype))
        if found != (expected, "float32"):
            raise DataError(
                f"encoder {spec.source}: encode_passages must return float32 {expected}, got {found[1]} {found[0]}"
            )
        is_unit = np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _MAX_NORM_ERROR
        if not is_unit.all():
            passage = passages[rows[int(is_unit.argmin())]]
            raise DataError(f"encoder {spec.source}: the vector of passage {passage.id!r} must have length 1")
        yield vectors


def read_vectors(path: Path, passages: PassageTable, encoder: Encoder, *, source: str) -> NDArray[np.float32]:
    """Reads the vectors of an .npz; returns them in the order of `passages`: float32 [n, dimension], of unit length.

    `source` names the encoder in error messages.

    Raises: DataError if the file cannot be read, its ids differ from the corpus's, its shape is wrong, a value is not
    finite, or the encoder makes other vectors from the same passages.
    """
    ids, vectors = _read_npz(path)
    expected = (len(ids), encoder.dimension)
    if vectors.shape != expected:
        raise DataError(
            f"{path}: vectors expected shape {expected} (ids x dimension of {source}), "
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
            "give the vectors of this corpus"
        )
    ordered = vectors[[row_of_id[passage_id] for passage_id in corpus_ids]].astype(np.float32)
    norms = np.linalg.norm(ordered, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        bad = int(np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[0])
        raise DataError(f"{path}: the vector of passage {corpus_ids[bad]!r} is not finite or zero; encode again")
    ordered = normalise(ordered)
    _check_made_by(encoder, ordered, passages, path=path, source=source)
    return ordered


def _read_npz(path: Path) -> tuple[NDArray[np.str_], NDArray[np.floating]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["ids"], file["vectors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error}; give an .npz with arrays `ids` and `vectors`") from None


def _check_made_by(
    encoder: Encoder, vectors: NDArray[np.float32], passages: PassageTable, *, path: Path, source: str
) -> None:
    rows = np.unique(np.linspace(0, len(passages) - 1, _SAMPLE_SIZE).astype(int))
    again = encoder.encode_passages([passages[int(row)] for row in rows])
    cosines = (again * vectors[rows]).sum(axis=1)
    worst = int(cosines.argmin())
    if cosines[worst] < _MIN_COSINE:
        passage = passages[int(rows[worst])]
        raise DataError(
            f"{path}: the vector of passage {passage.id!r} expected cosine >= {_MIN_COSINE} with the vector that "
            f"the encoder {source} makes, found {cosines[worst]:.3f}; give vectors made with these settings"
        )


def _check_replaceable(out: Path, *, force: bool) -> None:
    if not force:
        raise DataError(f"{out} exists; give another --out, or --force to replace an index there")
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(f"{out} exists and is not an index, so --force does not replace it; give another --out")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out` that replaces `out` at the end, or is removed if the body raises."""
    out = out.resolve()
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    _make_folder(out.parent)
    try:
        with atomic_path(out) as folder:
            _make_folder(folder)
            yield folder
            _sync(folder)
            if out.exists():
                out.rename(replaced)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {folder}: {error.strerror or error}; give another --out") from None


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
