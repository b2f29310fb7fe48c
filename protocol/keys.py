"""CURVE keys in files of zmq.auth's format: key pairs of processes, and the clients' keys that a server accepts."""

from __future__ import annotations

import logging
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DataError, SecurityError

log = logging.getLogger(__name__)

_PUBLIC = re.compile(r'^\s*public-key\s*=\s*"(\S{40})"\s*$', re.MULTILINE)
_SECRET = re.compile(r'^\s*secret-key\s*=\s*"(\S{40})"\s*$', re.MULTILINE)
_SETTLED_AFTER_NS = 2_000_000_000


@dataclass(frozen=True)
class Keys:
    """A folder created by `palimpsest keys`, or the part of it that a client's node has.

    Files: server.key, server.key_secret, client.key, client.key_secret, and authorized/*.key (all keys are Z85).
    """

    folder: Path

    def pair(self, name: str) -> tuple[bytes, bytes]:
        """Returns the (public, secret) keys of `server` or `client`.

        Raises: DataError (a file is missing or has no key pair), SecurityError (other users can read the secret key).
        """
        path = self.folder / f"{name}.key_secret"
        if not path.is_file():
            raise DataError(
                f"no {path.name} in keys folder {self.folder}: make one with `palimpsest keys {self.folder}`"
            )
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SecurityError(f"{path} can be read by others: run `chmod 600 {path}`")
        text = path.read_text(errors="replace")
        public, secret = _PUBLIC.search(text), _SECRET.search(text)
        if public is None or secret is None:
            raise DataError(f"{path} has no key pair")
        return public[1].encode(), secret[1].encode()

    def server_public(self) -> bytes:
        """Returns the server's public key. Raises: DataError."""
        path = self.folder / "server.key"
        if not path.is_file():
            raise DataError(f"no server.key in keys folder {self.folder}: copy it from the server's keys folder")
        if (public := _PUBLIC.search(path.read_text(errors="replace"))) is None:
            raise DataError(f"{path} has no public key")
        return public[1].encode()


class AllowList:
    """Accepts the clients whose public keys (Z85) are in `folder`/*.key.

    A change of the folder applies to the next client that connects; the server need not be restarted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_at_ns = -1
        self._keys: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Returns True if `key` is accepted. The name and the parameters are pyzmq's.

        It must not raise: an error would end the authenticator, and no client could connect any more.
        """
        try:
            changed_at_ns = self._folder.stat().st_mtime_ns
            if changed_at_ns != self._read_at_ns:
                keys = [_public_key(path) for path in sorted(self._folder.glob("*.key"))]
                self._keys = frozenset(found for found in keys if found is not None)
                # Read again next time if a file may be half written, or if the folder changed so recently that a
                # further change may leave its time stamp as it is (coarse clocks).
                settled = None not in keys and time.time_ns() - changed_at_ns > _SETTLED_AFTER_NS
                self._read_at_ns = changed_at_ns if settled else -1
        except OSError as error:
            log.error("the allow-list %s cannot be read, so every client is refused: %s", self._folder, error.strerror)
            self._keys, self._read_at_ns = frozenset(), -1
        return key in self._keys


def _public_key(path: Path) -> bytes | None:
    found = _PUBLIC.search(path.read_text(errors="replace"))
    if found is None:
        log.error("%s has no public key and is ignored", path)
        return None
    return found[1].encode()
