"""The identity of a run: everything that the work of its actors, evaluations and learner depends on.

    config ─► sections, without what may differ between hosts ─► paths replaced by digests of content ─► JSON by section

An actor sends `actor_identity` in its heartbeats; the learner refuses an actor whose identity differs from its own. The
learner stores `learner_identity`, and refuses to resume a run whose identity differs. Every key of the config counts
unless MAY_DIFFER or LEARNER_MAY_DIFFER lists it, so a new key or a new option of an extension is covered without a
change here.

Paths do not count, contents do, so two hosts may keep the same model in different folders. A host need not have every
file: an actor has no weights, and the learner has no question files. What one side lacks is not compared.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from protocol.config import Config
from protocol.config_base import ExtensionSection
from protocol.content_digest import files_digest, path_digest, text_digest
from protocol.errors import DataError
from protocol.identity_differences import CONTENT, MAX_SECTION_CHARS, MISSING

MAY_DIFFER = frozenset(
    {
        "run.dir",
        "run.base_dir",
        "network",
        "actor",
        "engine",
        "retriever.port",
        "retriever.max_batch",
        "retriever.threads",
        "retriever.dtype",
    }
)
"""Keys that may differ between hosts, and may change when a run is resumed: addresses, folders, sizes, time limits."""

LEARNER_MAY_DIFFER = frozenset(
    {
        "learner.tokens_per_micro_batch",
        "learner.prefix_sharing",
        "learner.device",
        "learner.ranks",
        "learner.activation_checkpointing",
        "learner.torch_threads",
        "learner.lease_timeout_s",
        "learner.straggler_timeout_s",
        "learner.checkpoint",
        "learner.retention",
        "learner.first_samples",
        "learner.max_failed_groups",
        "learner.max_skipped_groups",
        "learner.progress_log_s",
    }
)
"""Keys of the learner that may change when a run is resumed: placement, speed, time limits, what is kept."""

USED_BY_ACTORS = frozenset({"group_size"})
"""Keys of [learner] that actors use."""

# Folders of which only some files count.
_READ_HERE = frozenset({"model.path", "learner.reference", "retriever.indexes"})
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_TOKENIZER_CONFIG, _TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
# Longer strings are represented by their digest.
_MAX_STRING_CHARS = 80


def actor_identity(config: Config) -> dict[str, str]:
    """Section → JSON text of what an actor or an evaluation depends on. Raises: DataError (an unreadable file)."""
    tree = _tree(config)
    tree["learner"] = {key: getattr(config.learner, key) for key in sorted(USED_BY_ACTORS)}
    tree["code"] = {module: _source(module) for module in _modules(config)}
    return _texts(tree, max_chars=MAX_SECTION_CHARS)


def learner_identity(config: Config, *, weights: bool = True) -> dict[str, str]:
    """Section → JSON text of what a run's data and training depend on. Raises: DataError (an unreadable file).

    `learner.num_steps` counts only if the learning-rate schedule depends on it. The user's code does not count: a run
    may be resumed with a corrected workflow. `weights` False: weights are not read and count as missing files.
    """
    tree = _tree(config, weights=weights)
    learner = tree["learner"]
    learner["reference"] = _weights(config.learner.reference or config.model.path, read=weights)
    if config.learner.optimizer.schedule == "constant":
        del learner["num_steps"]
    return _texts(tree)


def _tree(config: Config, *, weights: bool = True) -> dict[str, Any]:
    """Section → its values that count, with paths replaced by digests of content."""
    excluded = MAY_DIFFER | LEARNER_MAY_DIFFER | _READ_HERE
    tree = {
        name: _values(getattr(config, name), name, config=config, excluded=excluded)
        for name in type(config).model_fields
        if name not in excluded
    }
    tree["model"] |= _model(config.model.path, weights=weights)
    tree["tool"] = {tool.lookup_name: values for tool, values in zip(config.tool, tree["tool"], strict=True)}
    manifests = {name: _files(folder, ("manifest.json",)) for name, folder in config.retriever.indexes.items()}
    tree["retriever"] |= {"default_index": next(iter(manifests), None), "indexes": manifests}
    return tree


def _values(value: Any, key: str, *, config: Config, excluded: frozenset[str]) -> Any:
    """The JSON value of a section, a list or a single value. Only options of extensions may name files as text."""
    if isinstance(value, ExtensionSection):
        own = {name: getattr(value, name) for name in type(value).model_fields}
        options = {name: _option(each, config) for name, each in value.options.items()}
        return {**_values(own, key, config=config, excluded=excluded), **options}
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if f"{key}.{name}" not in excluded}
        return {name: _values(each, f"{key}.{name}", config=config, excluded=excluded) for name, each in kept.items()}
    if isinstance(value, tuple | list):
        return [_values(each, key, config=config, excluded=excluded) for each in value]
    if isinstance(value, Path):
        return _path(value, str(value), config)
    return _short(value)


def _option(value: Any, config: Config) -> Any:
    """The JSON value of an extension's option. A text that names a file or folder is replaced by its content.

    A text with `/` or `.` that exists, taken from run.base_dir, is a path; so is a text with `/` that does not exist.
    A bare word is never a path: `./data` is.
    """
    if isinstance(value, Mapping):
        return {name: _option(each, config) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_option(each, config) for each in value]
    if not isinstance(value, str) or "://" in value or "\0" in value or not {"/", "."} & set(value):
        return _short(value)
    path = (config.run.base_dir or Path("/")) / value
    try:
        is_path = "/" in value or path.exists()
    except OSError:  # longer than a path may be
        is_path = False
    return _path(path, value, config) if is_path else _short(value)


def _path(path: Path, text: str, config: Config) -> dict[str, str]:
    """The content of a file or folder. A folder that contains the run's own files counts by its text."""
    run_folders = [each for each in (config.run.base_dir, config.run.dir) if each is not None]
    if path.is_dir() and any(each.resolve().is_relative_to(path.resolve()) for each in run_folders):
        return _content(None, text)
    try:
        return _content(path_digest(path), text)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _model(folder: Path, *, weights: bool) -> dict[str, Any]:
    return {
        "config": _files(folder, _MODEL_FILES),
        "tokenizer": _files(folder, _TOKENIZER_FILES),
        **_tokenizer_config(folder),
        "weights": _weights(folder, read=weights),
    }


def _weights(folder: Path, *, read: bool) -> dict[str, str]:
    names = [path.name for path in folder.glob("model*.safetensors*")] if read and folder.is_dir() else []
    return _files(folder, names)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and the chat template, which is in this file or in a separate file."""
    try:
        text = (folder / _TOKENIZER_CONFIG).read_text(encoding="utf-8")
        fields = json.loads(text)
        template = fields.pop("chat_template", None)
    except (OSError, ValueError, AttributeError):  # the tokenizer's loader reports it
        return {"tokenizer_config": _content(None, str(folder)), "chat_template": _content(None, str(folder))}
    file = _files(folder, (_TEMPLATE_FILE,))
    own = {CONTENT: text_digest(_json(template))}
    return {
        "tokenizer_config": {CONTENT: text_digest(_json(fields))},
        "chat_template": file if CONTENT in file else own,
    }


def _files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    try:
        return _content(files_digest(folder, names), str(folder))
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _content(digest: str | None, text: str) -> dict[str, str]:
    """The content's digest; without one, the digest of `text`, or of a path's last part if the path is absolute."""
    if digest is not None:
        return {CONTENT: digest}
    return {MISSING: text_digest(Path(text).name if text.startswith("/") else text)}


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _MAX_STRING_CHARS:
        return {CONTENT: text_digest(value)}
    return value


def _modules(config: Config) -> list[str]:
    """The modules of the user's code that actors import."""
    sections = (config.workflow, config.task, config.reward, *config.tool)
    return sorted({section.use.partition(":")[0] for section in sections if ":" in section.use})


def _source(module: str) -> dict[str, str]:
    """The source of a module, of its whole package if it is in one. Imports nothing."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if folders:
        folder = Path(folders[0])
        return _files(folder, [str(path.relative_to(folder)) for path in folder.rglob("*.py")])
    if spec is None or spec.origin is None:
        return _content(None, module)
    return _files(Path(spec.origin).parent, (Path(spec.origin).name,))


# --- text ---


def _texts(tree: Mapping[str, Any], *, max_chars: int | None = None) -> dict[str, str]:
    texts = {section: _json(values) for section, values in tree.items()}
    return {
        section: text if max_chars is None or len(text) <= max_chars else _json({CONTENT: text_digest(text)})
        for section, text in texts.items()
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
