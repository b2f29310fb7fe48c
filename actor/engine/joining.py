"""What a role needs that joins a run by hand: a name of its own, the run's addresses, an address that others reach."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import secrets
import socket
from urllib.parse import urlsplit

from protocol.addresses import is_loopback_host
from protocol.errors import ConfigError

_MAX_NAME_CHARS = 64
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def role_name(role: str, given: str | None) -> str:
    """`given`, or `<role>-<hostname>-<pid>`: two roles of one name would free each other's leases and files.

    Raises: ConfigError (a name that cannot be a folder's).
    """
    if given is None:
        return default_name(role, host=socket.gethostname(), pid=os.getpid())
    if len(given) > _MAX_NAME_CHARS or not _NAME.fullmatch(given):
        raise ConfigError(
            f"--name must be 1 to {_MAX_NAME_CHARS} of A-Z a-z 0-9 _ . - and not begin with a dot, got {given!r}"
        )
    return given


def default_name(role: str, *, host: str, pid: int) -> str:
    """The host's name gives way where it is too long."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", host)
    return f"{role}-{host[: _MAX_NAME_CHARS - len(f'{role}--{pid}')]}-{pid}"


def check_advertised(url: str, *, network_host: str) -> None:
    """Where the run spans nodes, every actor must be able to reach the engine at `url`. Raises: ConfigError."""
    host = urlsplit(url).hostname or ""
    if is_loopback_host(network_host) or not (is_loopback_host(host) or _is_wildcard(host)):
        return
    raise ConfigError(
        f"actors on other nodes (network.host is {network_host}) cannot reach an engine at {url}: "
        "give the address of this node with --advertise URL"
    )


def fresh_seed(run_seed: int, name: str) -> int:
    """A seed of 64 bits for the requests that bring none: other than every other engine's, and than this engine's
    before it was restarted, since equal streams would answer equal prompts of a group with equal completions."""
    text = f"{run_seed}/{name}/{secrets.token_hex(16)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
