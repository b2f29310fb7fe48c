"""An index folder's manifest: what the folder holds, and the checks against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import DataError
from protocol.framing import describe
from retriever.encoders.base import HUGGINGFACE, EncoderSpec
from retriever.structures.base import StructureSpec

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class IndexManifest(BaseModel):
    """`manifest.json`. The inner product of unit vectors is their cosine. `sha256` covers every other file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    encoder: EncoderSpec
    metric: Literal["inner_product"]
    num_passages: Annotated[int, Field(ge=1)]
    structure: StructureSpec
    sha256: dict[str, _Sha256]


def write_manifest(manifest: IndexManifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> IndexManifest:
    """Reads format versions 1 and 2; the result has version 2.

    Raises: DataError if the folder is not an index, or has another format version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise DataError(f"{folder} is not an index (it has no {MANIFEST_FILE}); make one with `palimpsest index`")
    try:
        tree = json.loads(path.read_bytes())
        version = tree.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise DataError(
                f"{path}: format_version must be 1 or {FORMAT_VERSION}, got {version}; "
                "build the index again with `palimpsest index`"
            )
        return IndexManifest.model_validate(_from_version_1(tree) if version == 1 else tree)
    except ValidationError as error:
        raise DataError(f"{path}: {describe(error)}; build the index again with `palimpsest index`") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest ({error}); build the index again with `palimpsest index`") from None


def _from_version_1(tree: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had the fields of the built-in encoders instead of `use` and `options`, and `hnsw` (null for flat)."""
    encoder, hnsw = tree["encoder"], tree["hnsw"]
    options = {name: encoder[name] for name in ("query_prefix", "passage_prefix", "pooling", "max_tokens")}
    if encoder["kind"] == "bow":
        use, options = "bow", {}
    elif encoder["source"] == "minilm":
        use = "minilm"
    else:
        use, options = HUGGINGFACE, {**options, "folder": encoder["source"]}
    return {
        "format_version": FORMAT_VERSION,
        "encoder": {
            "use": use,
            "options": options,
            "fingerprint": encoder["fingerprint"],
            "dimension": encoder["dimension"],
        },
        "metric": tree["metric"],
        "num_passages": tree["num_passages"],
        "structure": {"use": "flat", "options": {}} if hnsw is None else {"use": "hnsw", "options": hnsw},
        "sha256": tree["sha256"],
    }


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the named files of `folder`. Raises: DataError if one cannot be read."""
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
    """Raises: DataError that names the first file whose checksum differs from the manifest's."""
    found = checksums(folder, manifest.sha256)
    for name, expected in manifest.sha256.items():
        if found[name] != expected:
            raise DataError(
                f"{folder / name}: expected sha256 {expected[:12]}…, found {found[name][:12]}…; "
                "the file was changed or damaged: build the index again"
            )


def check_encoder(expected: EncoderSpec, found: EncoderSpec, *, folder: Path) -> None:
    """Checks that `found`, for queries, has fingerprint and dimension of `expected`, which made the index.

    Raises: DataError that names the first field that differs.
    """
    for field in ("fingerprint", "dimension"):
        ours, theirs = getattr(expected, field), getattr(found, field)
        if ours != theirs:
            raise DataError(
                f"index {folder} was made with another encoder: {field} expected {_short(ours)} "
                f"(made with {expected.source}), found {_short(theirs)} (in {found.source}); "
                "use the encoder that it was made with, or build the index again"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:16]}…"
