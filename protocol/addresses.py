"""Formats socket addresses and checks that they are loopback addresses (reachable only from this machine)."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from protocol.errors import SecurityError


def tcp_address(*, host: str, port: int) -> str:
    """Returns the ZeroMQ address of a TCP port."""
    return f"tcp://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Returns True for ipc://, inproc://, and tcp:// or http:// on a loopback host."""
    parts = urlsplit(address)
    return parts.scheme in ("ipc", "inproc") or is_loopback_host(parts.hostname or "")


def require_loopback(address: str, remedy: str) -> None:
    """Checks that a socket without keys has a loopback address. `remedy` is the error's hint how to get keys.

    Raises: SecurityError.
    """
    if not is_loopback(address):
        raise SecurityError(f"{address} is beyond loopback and needs CURVE keys: {remedy}")


def is_loopback_host(host: str) -> bool:
    """Returns True for `localhost` and for an IP address of the loopback range."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
