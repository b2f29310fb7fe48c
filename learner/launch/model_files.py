"""Reads what a Hugging Face folder states about its weights, from the headers of its safetensors files only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import DataError

_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`tensors`: name → shape. `num_bytes`: size of all weight files."""

    folder: Path
    architecture: str
    tensors: Mapping[str, tuple[int, ...]]
    num_files: int
    num_bytes: int

    @property
    def num_weights(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    def __str__(self) -> str:
        return (
            f"{self.architecture}, {self.num_weights / 1e6:,.1f} M weights in {self.num_files} files, "
            f"{self.num_bytes / 1e9:.2f} GB ({self.folder})"
        )


def read_model_files(folder: Path, *, key: str) -> ModelFiles:
    """`key`: the config key that names the folder. Raises: DataError (a missing, unreadable or truncated file)."""
    if not folder.is_dir():
        raise DataError(f"{key}: folder {folder} does not exist")
    fields = _json(folder / "config.json", key=key, remedy="give a Hugging Face model folder")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(_json(index, key=key, remedy="copy the model again").get("weight_map", {}).values()))
    tensors: dict[str, tuple[int, ...]] = {}
    for name in names:
        tensors |= _header(folder / name, key=key)
    architectures = fields.get("architectures") or [fields.get("model_type", "unknown architecture")]
    num_bytes = sum((folder / name).stat().st_size for name in names)
    return ModelFiles(folder, str(architectures[0]), tensors, len(names), num_bytes)


def _json(path: Path, *, key: str, remedy: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise DataError(f"{key}: {path} cannot be read: {error}; {remedy}") from error
    return tree


def _header(path: Path, *, key: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of a safetensors file, whose size must be the one that its header states."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise ValueError("it has no header")
            tree = json.loads(file.read(size))
        tree.pop("__metadata__", None)
        shapes = {name: tuple(each["shape"]) for name, each in tree.items()}
        end = 8 + size + max((each["data_offsets"][1] for each in tree.values()), default=0)
    except OSError as error:
        raise DataError(
            f"{key}: {path} cannot be read: {error.strerror}; save the model's weights there as safetensors"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{key}: {path} is not a safetensors file ({error}): copy the model again") from error
    if (found := path.stat().st_size) != end:
        raise DataError(f"{key}: {path} must have {end} bytes, got {found}: copy the model again")
    return shapes
