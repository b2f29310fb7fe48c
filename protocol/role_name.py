"""The name of an actor or engine process: given with --name, or made from the host name and the process id."""

from __future__ import annotations

import os
import re
import socket

from protocol.errors import ConfigError

_MAX_NAME_CHARS = 64
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def role_name(role: str, given: str | None) -> str:
    """Returns `given` if it is valid, or `<role>-<hostname>-<pid>` if it is None.

    Names must be unique in a run: two processes with one name would free each other's leases and delete each other's
    files. A name is also a folder's name. Raises: ConfigError (a name that is not valid as a folder's name).
    """
    if given is None:
        return default_name(role, host=socket.gethostname(), pid=os.getpid())
    if len(given) > _MAX_NAME_CHARS or not _NAME.fullmatch(given):
        raise ConfigError(
            f"--name must be 1 to {_MAX_NAME_CHARS} of A-Z a-z 0-9 _ . - and not begin with a dot, got {given!r}"
        )
    return given


def default_name(role: str, *, host: str, pid: int) -> str:
    """Returns `<role>-<host>-<pid>` with at most 64 characters; a host name that is too long is cut."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", host)
    return f"{role}-{host[: _MAX_NAME_CHARS - len(f'{role}--{pid}')]}-{pid}"
