"""`python -m retriever.check NAME=FOLDER…`: what the retriever can check before a start, without loading a model.

Files are checked by name and size of their headers, not by checksum: the retriever does that when it opens an index.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from protocol.check_result import CheckResult
from protocol.errors import DataError, UserError
from retriever.collection import split_argument
from retriever.encoders.base import HUGGINGFACE, EncoderSpec
from retriever.encoders.huggingface import minilm_folder
from retriever.extensions import ENCODERS, MINILM, STRUCTURES
from retriever.manifest import IndexManifest, read_manifest


def check_indexes(arguments: Sequence[str]) -> Iterator[CheckResult]:
    """Yields one result for each `NAME=FOLDER`."""
    for argument in arguments:
        name, folder = split_argument(argument)
        subject = f"index {name}"
        try:
            yield CheckResult("ok", subject, check_index(folder))
        except UserError as error:
            yield CheckResult("fail", subject, str(error))


def check_index(folder: Path) -> str:
    """Returns what the index contains. Raises: DataError, ConfigError (the user's own encoder)."""
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist: make the index with `palimpsest index`")
    manifest = read_manifest(folder)
    if missing := [name for name in manifest.sha256 if not (folder / name).is_file()]:
        raise DataError(f"index {folder} has no {missing[0]}: build the index again")
    _check_vectors(folder, manifest)
    STRUCTURES.load(manifest.structure.use, key=f"index {folder}: structure")
    ENCODERS.load(manifest.encoder.use, key=f"index {folder}: encoder")
    _check_encoder_model(folder, manifest.encoder)
    return (
        f"{manifest.num_passages} passages, encoder {manifest.encoder.source}, dimension {manifest.encoder.dimension}"
    )


def _check_vectors(folder: Path, manifest: IndexManifest) -> None:
    vectors = folder / "vectors.npy"
    if not vectors.is_file():
        return
    try:
        shape = np.load(vectors, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        raise DataError(f"{vectors} cannot be read: {error}; build the index again") from error
    wanted = (manifest.num_passages, manifest.encoder.dimension)
    if shape != wanted:
        raise DataError(f"{vectors}: shape must be {wanted}, got {shape}; build the index again")


def _check_encoder_model(folder: Path, spec: EncoderSpec) -> None:
    """Checks the folder of a Hugging Face encoder: its files and its dimension. Other encoders have none."""
    if spec.use not in (MINILM, HUGGINGFACE):
        return
    model = minilm_folder() if spec.use == MINILM else Path(str(spec.options["folder"]))
    remedy = "put the encoder that the index was made with there, or build the index again"
    try:
        found = json.loads((model / "config.json").read_bytes()).get("hidden_size")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"index {folder}: {model / 'config.json'} of its encoder cannot be read: {error}; {remedy}"
        ) from error
    if not any(model.glob("*.safetensors")):
        raise DataError(f"index {folder}: its encoder {model} has no *.safetensors; {remedy}")
    if found != spec.dimension:
        raise DataError(
            f"index {folder}: dimension expected {spec.dimension}, found {found} in the encoder {model}; {remedy}"
        )


if __name__ == "__main__":
    for result in check_indexes(sys.argv[1:]):
        print(result, flush=True)
