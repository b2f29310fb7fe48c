"""The manifest of a checkpoint, state.json: the progress of training, and size and checksum of every other file.

{"training": {"step": 40, …}, "files": {"model.safetensors": {"num_bytes": 123, "blake2b": "…"}, …}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DataError

NAME = "state.json"
_NUM_THREADS = 8


class DamagedCheckpoint(DataError):
    """A checkpoint with a file that is missing, has another size or another content. The message names the file."""


@dataclass(frozen=True, slots=True)
class File:
    """What a manifest states of a file. `blake2b`: the hexadecimal checksum of its content."""

    num_bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`training`: the fields of TrainingProgress. `files`: path relative to the folder → its size and checksum."""

    training: Mapping[str, int]
    files: Mapping[str, File]


def make_manifest(folder: Path, *, training: Mapping[str, int]) -> str:
    """The text of the manifest of a folder that is complete but for its manifest. Raises: OSError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_NUM_THREADS) as threads:  # hashlib releases the interpreter lock
        digests = list(threads.map(_digest, paths))
    files = {
        str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "blake2b": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    return json.dumps({"training": dict(training), "files": files}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Raises: DamagedCheckpoint."""
    try:
        tree = json.loads((folder / NAME).read_text())
        training = {str(key): int(value) for key, value in tree["training"].items()}
        files = {str(name): File(int(file["num_bytes"]), str(file["blake2b"])) for name, file in tree["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: {NAME} cannot be read: {error!r}") from error
    if not files:
        raise DamagedCheckpoint(f"checkpoint {folder}: {NAME} lists no file")
    return Manifest(training, files)


def check_sizes(folder: Path) -> Manifest:
    """Returns the manifest if every file is there with its size. Raises: DamagedCheckpoint."""
    manifest = read_manifest(folder)
    for name, file in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {folder}: {name} cannot be read: {error.strerror}") from error
        if num_bytes != file.num_bytes:
            raise DamagedCheckpoint(f"checkpoint {folder}: {name} must have {file.num_bytes} bytes, got {num_bytes}")
    return manifest


def check_content(folder: Path, *, policy_only: bool = False) -> Manifest:
    """Returns the manifest if every file has its size and checksum; reads the files. Raises: DamagedCheckpoint.

    `policy_only`: reads the files of the Hugging Face folder, and not the training state.
    """
    manifest = check_sizes(folder)
    names = [name for name in manifest.files if not (policy_only and "/" in name)]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        digests = [(name, threads.submit(_digest, folder / name)) for name in names]
    for name, digest in digests:
        try:
            found = digest.result()
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {folder}: {name} cannot be read: {error.strerror}") from error
        if found != manifest.files[name].blake2b:
            raise DamagedCheckpoint(f"checkpoint {folder}: the content of {name} does not have its checksum")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
