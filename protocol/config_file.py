"""Reading and saving a run's config: TOML or JSON, overrides, errors that name the key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from protocol.config import Config
from protocol.errors import ConfigError, DataError

_PATH_KEYS = {
    ("run", "dir"),
    ("model", "path"),
    ("network", "keys"),
    ("network", "api_key_file"),
    ("task", "questions"),
    ("task", "eval_questions"),
    ("retriever", "indexes"),
    ("learner", "reference"),
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a .toml or .json config; relative paths in it are taken from its folder, those in `overrides` (and the
    default of run.dir) from here. All paths of the result are absolute, so that what is saved reads the same anywhere.

    `overrides` are `section.key=value` with a TOML value (a bare word counts as a string).
    Raises: ConfigError (names the key), DataError (no such file, not TOML).
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"config {path} cannot be read: {error.strerror}") from error
    try:
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text.decode())
    except ValueError as error:
        raise DataError(f"config {path} is not valid {path.suffix.lstrip('.') or 'TOML'}: {error}") from error
    if not isinstance(tree, dict):
        raise DataError(f"config {path} must hold a table of sections, got {type(tree).__name__}")
    for key in _PATH_KEYS:
        _resolve(tree, key, path.resolve().parent)
    for override in overrides:
        _apply(tree, override)
    for key in _PATH_KEYS:
        _resolve(tree, key, Path.cwd())
    config = parse_config(tree, source=str(path))
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": config.run.dir.absolute()})})


def parse_config(tree: dict[str, object], *, source: str) -> Config:
    """Raises: ConfigError with the path, the bound and the value of each problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "unknown key; " + _known_keys(problem["loc"])
            elif problem["type"] == "missing":
                message = "must be set"
            else:
                message += f", got {problem['input']!r:.80}"
            problems.append(f"{key}: {message}" if key else message)
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as JSON, aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(config.model_dump_json(indent=2) + "\n")
    aside.replace(path)


def require_ports(config: Config, *keys: str) -> None:
    """Port 0 is for a launcher to resolve; a socket that connects to it would wait for ever. Raises: ConfigError."""
    ports = {
        "network.control_port": config.network.control_port,
        "network.weights_port": config.network.weights_port,
        "network.announce_port": config.network.announce_port,
        "retriever.port": config.retriever.port,
    }
    if missing := [key for key in keys if not ports[key]]:
        names, verb, them = " and ".join(missing), *(("is", "it") if len(missing) == 1 else ("are", "them"))
        raise ConfigError(
            f"{names} {verb} 0: set {them}, or give the config.json that `palimpsest up` saved in the run's folder"
        )


def _resolve(tree: object, key: tuple[str, ...], base: Path) -> None:
    for part in key[:-1]:
        tree = tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or key[-1] not in tree:
        return
    value = tree[key[-1]]
    if isinstance(value, str):
        tree[key[-1]] = str(base / value)
    elif isinstance(value, list):
        tree[key[-1]] = [str(base / item) if isinstance(item, str) else item for item in value]
    elif isinstance(value, dict):
        tree[key[-1]] = {name: str(base / item) if isinstance(item, str) else item for name, item in value.items()}


def _apply(tree: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set must be section.key=value, got {override!r}")
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
        tree = child
    tree[parts[-1]] = value


def _known_keys(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return "remove it"
        section = field.annotation
    return "known here: " + ", ".join(section.model_fields)
