"""Reads and saves a run's config (TOML or JSON) and applies overrides; errors name the key."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from protocol.algorithm_config import ADVANTAGE_OPTIONS, CORRECTION_OPTIONS, LOSS_OPTIONS
from protocol.atomic_write import atomic_write
from protocol.config import Config
from protocol.config_base import ExtensionSection
from protocol.errors import ConfigError, DataError
from protocol.extensions import problems, suggestion, validated_options

_PATH_KEYS = {
    ("run", "dir"),
    ("run", "base_dir"),
    ("model", "path"),
    ("network", "keys"),
    ("network", "api_key_file"),
    ("task", "questions"),
    ("task", "eval_questions"),
    ("retriever", "indexes"),
    ("learner", "reference"),
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a .toml or .json config. All paths of the result are absolute, so the saved config is the same everywhere.

    Relative paths in the file are taken from its folder, those in `overrides` (and the default of run.dir) from the
    current folder. Relative paths in the options of imported extensions are taken from run.base_dir, which is set to
    the file's folder here. `overrides` are `section.key=value` with a TOML value; a bare word is a string.
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
        raise DataError(f"config {path} must be a table of sections, got {type(tree).__name__}")
    folder = path.resolve().parent
    for key in _PATH_KEYS:
        _resolve(tree, key, folder)
    for override in overrides:
        _apply(tree, override)
    for key in _PATH_KEYS:
        _resolve(tree, key, Path.cwd())
    config = parse_config(tree, source=str(path))
    run = {"dir": Path(os.path.abspath(config.run.dir)), "base_dir": config.run.base_dir or folder}
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def parse_config(tree: dict[str, object], *, source: str) -> Config:
    """Validates a config. Raises: ConfigError with the key, the bound and the value of each problem."""
    try:
        config = Config.model_validate(tree)
        _check_algorithm_options(config)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(problems(error, Config))) from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return config


def _check_algorithm_options(config: Config) -> None:
    """Checks options of built-in algorithms; the learner checks those of imported classes. Raises: ConfigError."""
    sections: list[tuple[str, ExtensionSection, Mapping[str, type[BaseModel]]]] = [
        ("learner.advantage", config.learner.advantage, ADVANTAGE_OPTIONS),
        ("learner.loss", config.learner.loss, LOSS_OPTIONS),
        *(
            (f"learner.loss.corrections[{i}]", correction, CORRECTION_OPTIONS)
            for i, correction in enumerate(config.learner.loss.corrections)
        ),
    ]
    for key, section, builtins in sections:
        if ":" in section.use:
            continue
        if section.use not in builtins:
            raise ConfigError(
                f"{key}.use: there is no built-in {section.use!r}{suggestion(section.use, builtins)}; built-in: "
                f"{', '.join(builtins)}; your own code is named by an import path package.module:Name"
            )
        validated_options(builtins[section.use], section, key=key)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as JSON; readers see the old file or the new one."""
    atomic_write(path, config.model_dump_json(indent=2) + "\n")


def require_ports(config: Config, *keys: str) -> None:
    """Checks that the ports in `keys` are set: only a launcher replaces 0 by a free port. Raises: ConfigError."""
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
