"""Extension points: places where a run file names code, built in or from the user's own package.

    [workflow]                           ExtensionPoint.create(section)
    use = "notes.agent:Notes"     ─►     import notes.agent, take Notes
    max_turns = 4                 ─►     Notes.Options(max_turns=4), validated
                                  ─►     Notes(options, **resources)

`use` is a built-in name or an import path `package.module:Name`. The process that needs the code imports it, so the
learner never imports a workflow. An error is one sentence with the key, the import path and the
problem.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from protocol.config_base import ExtensionSection, Options
from protocol.errors import ConfigError, ExtensionError, PalimpsestError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtensionPoint:
    """One kind of extension.

    key       the section of the run file: `workflow`, `learner.loss` …
    noun      its name in error messages: "workflow", "policy loss" …
    builtins  built-in name → import path `package.module:Name`
    methods   method name → its signature, as error messages print it; a signature that starts with `async` must be a
              coroutine function
    """

    key: str
    noun: str
    builtins: Mapping[str, str]
    methods: Mapping[str, str] = field(default_factory=dict)

    def load(self, use: str, *, key: str = "") -> type:
        """The class that `use` names. `key` replaces `self.key` in errors (`tool[1]`). Raises: ConfigError."""
        key = f"{key or self.key}.use"
        path = self.builtins.get(use, use)
        module_name, separator, name = path.partition(":")
        if not separator:
            raise ConfigError(
                f"{key}: there is no built-in {self.noun} {use!r}{suggestion(use, self.builtins)}; built-in: "
                f"{', '.join(self.builtins)}; your own code is named by an import path package.module:Name"
            )
        found = _attribute(_import(module_name, key=key, use=use), name, key=key, use=use)
        self._check(found, key=key, use=use)
        return found

    def create(self, section: ExtensionSection, *, base_dir: Path | None, key: str = "", **resources: Any) -> Any:
        """An instance of the class that `section.use` names, from its validated options and the given `resources`.

        Relative paths among the options are taken from `base_dir`. Raises: ConfigError.
        """
        extension = self.load(section.use, key=key)
        options = options_of(extension, section, key=key or self.key, base_dir=base_dir)
        try:
            return extension(options, **resources)
        except PalimpsestError:
            raise
        except Exception as error:
            log.exception("%s could not be created", section.use)
            raise ConfigError(f"{key or self.key}.use: creating {section.use} raised {described(error)}") from error

    @contextmanager
    def running(self, use: object) -> Iterator[None]:
        """Converts exceptions in the body, a call of the algorithm `use` (an import path or the object itself).

        An exception of an imported class is logged with its traceback and raised as ExtensionError, which ends the run
        with one sentence. Exceptions of built-ins are not converted.
        """
        name = use if isinstance(use, str) else f"{type(use).__module__}:{type(use).__qualname__}"
        try:
            yield
        except PalimpsestError:
            raise
        except Exception as error:
            if ":" not in name or name in self.builtins.values():
                raise
            log.exception("the %s %s failed", self.noun, name)
            raise ExtensionError(f"{self.key}: the {self.noun} {name} raised {described(error)}") from error

    def _check(self, found: object, *, key: str, use: str) -> None:
        if not inspect.isclass(found):
            raise ConfigError(f"{key}: {use} must be a class, got {type(found).__name__}")
        for name, signature in self.methods.items():
            method = getattr(found, name, None)
            if not callable(method) or getattr(method, "__isabstractmethod__", False):
                raise ConfigError(f"{key}: {use} has no method {signature}")
            if signature.startswith("async") and not inspect.iscoroutinefunction(method):
                raise ConfigError(f"{key}: {use}.{name} must be a coroutine function: {signature}")
        if not _is_model(getattr(found, "Options", Options)):
            raise ConfigError(f"{key}: {use}.Options must be a subclass of palimpsest.Options")


def options_of(extension: type, section: ExtensionSection, *, key: str, base_dir: Path | None) -> Any:
    """The section's options, validated by the extension's `Options` model. Raises: ConfigError."""
    return validated_options(getattr(extension, "Options", Options), section, key=key, base_dir=base_dir)


def validated_options(
    model: type[BaseModel], section: ExtensionSection, *, key: str, base_dir: Path | None = None
) -> Any:
    """The section's options as an instance of `model`, relative paths taken from `base_dir`. Raises: ConfigError."""
    try:
        options = model.model_validate(section.options)
    except ValidationError as error:
        own_keys = tuple(type(section).model_fields)
        raise ConfigError("; ".join(problems(error, model, key=key, own_keys=own_keys))) from error
    if base_dir is None:
        return options
    return options.model_copy(update={name: _absolute(value, base_dir) for name, value in options})


def problems(
    error: ValidationError, model: type[BaseModel], *, key: str = "", own_keys: tuple[str, ...] = ()
) -> list[str]:
    """One clause for each problem that pydantic found in a config: its key, the bound and the value.

    `own_keys` are valid at the top level in addition to the fields of `model`.
    """
    return [_problem(each, model, key=key, own_keys=own_keys) for each in error.errors()]


def suggestion(word: str, known: Mapping[str, object] | list[str]) -> str:
    """`; did you mean 'x'` if a known word is close to `word`, else nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}" if close else ""


def described(error: BaseException) -> str:
    """`TypeError: … (agent.py, line 12)`: the error and the last line of the traceback that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    try:
        text = str(error).strip()
    except Exception:  # of the error's own class
        text = "its message cannot be read"
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _import(name: str, *, key: str, use: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{key}: {use} cannot be imported: there is no module {error.name!r}; add the folder that holds it to "
                "PYTHONPATH"
            ) from error
        raise ConfigError(f"{key}: {use} cannot be imported: it needs the module {error.name!r}") from error
    except Exception as error:
        log.exception("importing %s failed", name)
        raise ConfigError(f"{key}: {use} cannot be imported: {described(error)}") from error


def _attribute(module: object, name: str, *, key: str, use: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")]
            raise ConfigError(f"{key}: {use} cannot be imported: its module has no {name!r}{suggestion(name, public)}")
        found = getattr(found, part)
    return found


def _is_model(model: object) -> bool:
    return inspect.isclass(model) and issubclass(model, BaseModel)


def _absolute(value: object, base_dir: Path) -> object:
    match value:
        case Path():
            return base_dir / value
        case tuple() | list():
            return type(value)(_absolute(item, base_dir) for item in value)
        case dict():
            return {name: _absolute(item, base_dir) for name, item in value.items()}
        case _:
            return value


def _problem(problem: Any, model: type[BaseModel], *, key: str, own_keys: tuple[str, ...]) -> str:
    kind, location = problem["type"], problem["loc"]
    name = key
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    if kind == "extra_forbidden":
        message = "unknown key" + _known_keys(model, location, own_keys)
    elif kind == "missing":
        message = "must be set"
    else:
        message = _plain(problem)
        if location:
            message += f", got {problem['input']!r:.80}"
    return f"{name}: {message}" if name else message


_BOUNDS = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"), "less_than_equal": ("le", "<=")}
_BOUNDS["less_than"] = ("lt", "<")


def _plain(problem: Any) -> str:
    """Pydantic's message, reworded like this project's other errors."""
    if problem["type"] in _BOUNDS:
        bound, sign = _BOUNDS[problem["type"]]
        return f"must be {sign} {problem['ctx'][bound]:g}"
    if problem["type"] == "literal_error":
        return f"must be one of {problem['ctx']['expected']}"
    if problem["type"] == "string_pattern_mismatch" and problem["loc"] and problem["loc"][-1] == "use":
        return "must be a built-in name or an import path package.module:Name"
    return problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...], own_keys: tuple[str, ...]) -> str:
    for part in location[:-1]:
        found = model.model_fields.get(str(part))
        if found is None or not _is_model(found.annotation):
            return "; remove it"
        model, own_keys = found.annotation, ()  # pyright: ignore[reportAssignmentType]
    known = [*model.model_fields, *own_keys]
    if not known:
        return "; there are no keys here"
    return f"{suggestion(str(location[-1]), known)}; known here: {', '.join(known)}"
