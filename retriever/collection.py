"""A collection: an index with its encoder, under a name; opened from the arguments of `palimpsest retriever`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError
from retriever.encoders.base import Compute, Encoder
from retriever.extensions import reopen_encoder
from retriever.index_folder import LoadedIndex, load_index


@dataclass(frozen=True, slots=True)
class Collection:
    """An index and the encoder that its vectors were made with."""

    name: str
    index: LoadedIndex
    encoder: Encoder


def open_collections(
    arguments: Sequence[str],
    *,
    encoder: str | None = None,
    ef_search: int | None = None,
    compute: Compute | None = None,
) -> list[Collection]:
    """Opens each `FOLDER` or `NAME=FOLDER`; indexes made with the same model share one encoder.

    Raises: DataError if an index or its encoder cannot be used, or `encoder` is not the one it was made with;
    ConfigError if a name occurs twice, or a user's own encoder or index structure cannot be imported.
    """
    compute = compute or Compute()
    collections: dict[str, Collection] = {}
    encoders: dict[str, Encoder] = {}
    for argument in arguments:
        name, folder = split_argument(argument)
        if name in collections:
            raise ConfigError(
                f"two indexes are called {name!r}: {collections[name].index.folder} and {folder}; write NAME={folder}"
            )
        loaded = load_index(folder, ef_search=ef_search, num_threads=compute.num_threads)
        spec = loaded.manifest.encoder
        # An encoder without a fingerprint may have another state in each index, so it is not shared.
        key = spec.model_dump_json() if spec.fingerprint else str(folder)
        if key not in encoders:
            encoders[key] = reopen_encoder(spec, index_folder=folder, encoder=encoder, compute=compute)
        collections[name] = Collection(name, loaded, encoders[key])
    return list(collections.values())


def split_argument(argument: str) -> tuple[str, Path]:
    """The name and the folder of `NAME=FOLDER`, or of `FOLDER`, whose name is the folder's."""
    name, separator, folder = argument.partition("=")
    if separator and "/" not in name:
        return name, Path(folder)
    return Path(argument).resolve().name, Path(argument)
