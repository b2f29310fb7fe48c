"""CURVE keys in files (as zmq.auth writes them): a process's own, and those that a server lets in."""

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
_SETTLED_AFTER_NS = 2_000_000_000
_SECRET = re.compile(r'^\s*secret-key\s*=\s*"(\S{40})"\s*$', re.MULTILINE)


@dataclass(frozen=True)
class Keys:
    """A folder made by `palimpsest keys`: server.key(_secret), client.key(_secret) and authorized/*.key (all Z85)."""

    folder: Path

    def pair(self, name: str) -> tuple[bytes, bytes]:
        """(public, secret) of `server` or `client`. Raises: DataError, SecurityError (a secret readable by others)."""
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
            raise DataError(f"{path} holds no pair of keys")
        return public[1].encode(), secret[1].encode()

    def server_public(self) -> bytes:
        path = self.folder / "server.key"
        if not path.is_file():
            raise DataError(
                f"no server.key in keys folder {self.folder}: copy the one of the server's keys folder there"
            )
        if (public := _PUBLIC.search(path.read_text(errors="replace"))) is None:
            raise DataError(f"{path} holds no public key")
        return public[1].encode()


class AllowList:
    """The clients whose public keys (Z85) lie as *.key in `folder`, as it is when each of them connects."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_at_ns = -1
        self._keys: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether `key` is let in (the name and the parameters are pyzmq's). It must not raise: no one else would be
        let in any more."""
        try:
            changed_at_ns = self._folder.stat().st_mtime_ns
            if changed_at_ns != self._read_at_ns:
                keys = [_public_key(path) for path in sorted(self._folder.glob("*.key"))]
                self._keys = frozenset(found for found in keys if found is not None)
                # Read anew next time where a file may be half written, or the clock too coarse for the next change.
                settled = None not in keys and time.time_ns() - changed_at_ns > _SETTLED_AFTER_NS
                self._read_at_ns = changed_at_ns if settled else -1
        except OSError as error:
            log.error("the allow-list %s cannot be read, so nobody is let in: %s", self._folder, error.strerror)
            self._keys, self._read_at_ns = frozenset(), -1
        return key in self._keys


def _public_key(path: Path) -> bytes | None:
    found = _PUBLIC.search(path.read_text(errors="replace"))
    if found is None:
        log.error("%s holds no public key: nobody is let in by it", path)
        return None
    return found[1].encode()
