"""What an index folder says of itself, and what is refused where it says something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import DataError
from protocol.framing import describe
from retriever.encoders.base import EncoderSpec

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class HnswSettings(BaseModel):
    """The graph's parameters (Malkov & Yashunin, arXiv 1603.09320): M links a node, and the two candidate lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    m: Annotated[int, Field(ge=2, le=256)] = 32
    ef_construction: Annotated[int, Field(ge=8, le=4096)] = 200
    ef_search: Annotated[int, Field(ge=1, le=65_536)] = 128


class IndexManifest(BaseModel):
    """`manifest.json`.

    The inner product of unit vectors is their cosine. `hnsw` is null where every vector is compared (`--structure
    flat`). `sha256` covers every other file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    encoder: EncoderSpec
    metric: Literal["inner_product"]
    num_passages: Annotated[int, Field(ge=1)]
    hnsw: HnswSettings | None
    sha256: dict[str, _Sha256]


def write_manifest(manifest: IndexManifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> IndexManifest:
    """Raises: DataError where the folder is no index, or one of another format."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise DataError(f"{folder} is no index (it has no {MANIFEST_FILE}); make one with `palimpsest index`")
    try:
        manifest = IndexManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: {describe(error)}; build the index again with `palimpsest index`") from None
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {manifest.format_version}; "
            "build the index again with `palimpsest index`"
        )
    return manifest


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the named files of `folder`. Raises: DataError where one cannot be read."""
    digests: dict[str, str] = {}
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"cannot read {name} of index {folder}: {error.strerror or error}; build the index again"
            ) from None
    return digests


def check_files(manifest: IndexManifest, folder: Path) -> None:
    """Raises: DataError naming the first file whose bytes are not those that were written."""
    found = checksums(folder, manifest.sha256)
    for name, expected in manifest.sha256.items():
        if found[name] != expected:
            raise DataError(
                f"{folder / name}: expected sha256 {expected[:12]}…, found {found[name][:12]}…; "
                "the file was changed or damaged: build the index again"
            )


def check_encoder(expected: EncoderSpec, found: EncoderSpec, *, folder: Path) -> None:
    """`expected` made the index, `found` would encode its queries; all but `source` must agree.

    Raises: DataError naming the first field that differs.
    """
    for field in EncoderSpec.model_fields:
        ours, theirs = getattr(expected, field), getattr(found, field)
        if field != "source" and ours != theirs:
            raise DataError(
                f"index {folder} was made with another encoder: {field} expected {_short(ours)} "
                f"(made with {expected.source}), found {_short(theirs)} (in {found.source}); "
                "use the encoder that it was made with, or build the index again"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:16]}…"
