"""From what a user writes to collections that can be searched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ConfigError
from retriever.encoders.base import Compute, Encoder
from retriever.encoders.catalogue import reopen_encoder
from retriever.index import load_index
from retriever.search import Collection


def open_collections(
    arguments: Sequence[str],
    *,
    encoder: str | None = None,
    ef_search: int | None = None,
    compute: Compute | None = None,
) -> list[Collection]:
    """Opens each `FOLDER` or `NAME=FOLDER`; indexes made with the same model share it.

    Raises: DataError where an index or its encoder cannot be used, or `encoder` is not the one it was made with;
    ConfigError where a name occurs twice.
    """
    compute = compute or Compute()
    collections: dict[str, Collection] = {}
    models: dict[str, Encoder] = {}
    for argument in arguments:
        name, folder = split_argument(argument)
        if name in collections:
            raise ConfigError(
                f"two indexes are called {name!r}: {collections[name].index.folder} and {folder}; write NAME={folder}"
            )
        loaded = load_index(folder, ef_search=ef_search, num_threads=compute.num_threads)
        spec = loaded.manifest.encoder
        opened = models.get(spec.model_dump_json())
        if opened is None:
            opened = reopen_encoder(spec, index_folder=folder, source=encoder, compute=compute)
            models[spec.model_dump_json()] = opened
        collections[name] = Collection(name, loaded, opened)
    return list(collections.values())


def split_argument(argument: str) -> tuple[str, Path]:
    """`NAME=FOLDER` or `FOLDER`, whose name is then the folder's."""
    name, separator, folder = argument.partition("=")
    if separator and "/" not in name:
        return name, Path(folder)
    return Path(argument).resolve().name, Path(argument)
