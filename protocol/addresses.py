"""Which addresses stay on this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from protocol.errors import SecurityError


def is_loopback(address: str) -> bool:
    """True for ipc://, inproc:// and tcp:// or http:// on a loopback host."""
    parts = urlsplit(address)
    return parts.scheme in ("ipc", "inproc") or is_loopback_host(parts.hostname or "")


def require_loopback(address: str, remedy: str) -> None:
    """For who has no keys. Raises: SecurityError, with where to get some."""
    if not is_loopback(address):
        raise SecurityError(f"{address} is beyond loopback and needs CURVE keys: {remedy}")


def is_loopback_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
