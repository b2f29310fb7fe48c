"""The bearer token that the launcher gives to the engines of a run on loopback, where the config names none."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from protocol.config import Config


def with_engine_token(config: Config, path: Path) -> Config:
    """Returns the config with `network.api_key_file`; writes a new token to `path` if it is unset and engines run here.

    Only this user can read the file. Actors and weight agents find it through the saved config. Raises: OSError.
    """
    if config.network.api_key_file is not None or not config.engine.count:
        return config
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return config.model_copy(update={"network": config.network.model_copy(update={"api_key_file": path.absolute()})})
