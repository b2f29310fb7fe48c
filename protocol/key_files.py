"""Creates the key files that `protocol.keys` reads. `make_pair` returns a new (public, secret) pair of Z85 keys."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from protocol.errors import DataError
from protocol.keys import Keys

_CLIENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

MakePair = Callable[[], tuple[bytes, bytes]]


def create_keys(folder: Path, *, make_pair: MakePair) -> None:
    """Creates a server pair, a client pair, and the allow-list with that client. Raises: DataError (keys exist)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if existing := sorted(folder.glob("*.key*")):
        raise DataError(f"{folder} already holds {existing[0].name}: choose another folder")
    for name in ("server", "client"):
        _write_pair(folder, name, make_pair())
    (folder / "authorized").mkdir()
    shutil.copyfile(folder / "client.key", folder / "authorized" / "client.key")


def create_client(folder: Path, name: str, *, make_pair: MakePair) -> Path:
    """Creates and authorizes the keys of one more client. Returns the folder to copy to its node. Raises: DataError."""
    if not _CLIENT_NAME.fullmatch(name):
        raise DataError(f"a client's name must be 1 to 64 of A-Z a-z 0-9 _ -, got {name!r}")
    Keys(folder).server_public()
    client, public = folder / "clients" / name, folder / "authorized" / f"{name}.key"
    if client.exists() or public.exists():
        raise DataError(
            f"{folder} already has a client {name}: choose another name, or delete {public} to revoke its access"
        )
    client.mkdir(parents=True, mode=0o700)
    _write_pair(client, "client", make_pair())
    shutil.copyfile(folder / "server.key", client / "server.key")
    shutil.copyfile(client / "client.key", public)
    return client


def _write_pair(folder: Path, name: str, pair: tuple[bytes, bytes]) -> None:
    """Writes the files of a pair in zmq.auth's format. No other user can read the secret one at any time."""
    public, secret = (key.decode() for key in pair)
    (folder / f"{name}.key").write_text(f'metadata\ncurve\n    public-key = "{public}"\n')
    path = folder / f"{name}.key_secret"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f'metadata\ncurve\n    public-key = "{public}"\n    secret-key = "{secret}"\n')
