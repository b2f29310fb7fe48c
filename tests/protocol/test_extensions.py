"""Extension points: every error is one sentence with the key, the import path and what is missing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.config_base import ExtensionSection
from protocol.errors import ConfigError, DataError, ExtensionError
from protocol.extensions import ExtensionPoint

POINT = ExtensionPoint(
    key="agent",
    noun="agent",
    builtins={"counter": "collections:Counter", "ordered": "collections:OrderedDict"},
    methods={"run": "async def run(self, question) -> Episode", "stop": "def stop(self)"},
)
NO_METHODS = ExtensionPoint(key="agent", noun="agent", builtins={"counter": "collections:Counter"})

GOOD = """
from pathlib import Path
from palimpsest import Options

class Notes:
    class Options(Options):
        max_turns: int = 4
        file: Path = Path("default.txt")
        files: tuple[Path, ...] = ()
        by_name: dict[str, Path] = {}

    def __init__(self, options, *, seed=0):
        self.options, self.seed = options, seed

    async def run(self, question):
        return question

    def stop(self):
        pass
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module that can be imported, and returns its name, which no other test uses."""
    monkeypatch.syspath_prepend(tmp_path)
    written: list[str] = []

    def write_module(code: str) -> str:
        name = f"module_of_{tmp_path.name}_{len(written)}"
        (tmp_path / f"{name}.py").write_text(code)
        written.append(name)
        return name

    yield write_module
    for name in written:
        sys.modules.pop(name, None)


def section(use: str, **options: object) -> ExtensionSection:
    return ExtensionSection.model_validate({"use": use, **options})


def refusal(point: ExtensionPoint, use: str, **options: object) -> str:
    """The sentence with which `create` refuses the section."""
    with pytest.raises(ConfigError) as caught:
        point.create(section(use, **options), base_dir=None)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_unknown_built_in_names_the_closest_and_all_built_ins() -> None:
    assert refusal(POINT, "conter") == (
        "agent.use: there is no built-in agent 'conter'; did you mean 'counter'; built-in: counter, ordered; your own "
        "code is named by an import path package.module:Name"
    )
    assert "did you mean" not in refusal(POINT, "xyz")


def test_a_given_key_takes_the_place_of_the_points_own() -> None:
    with pytest.raises(ConfigError, match=r"^tool\[1\]\.use: there is no built-in agent 'xyz'"):
        POINT.load("xyz", key="tool[1]")
    with pytest.raises(ConfigError, match=r"^tool\[1\]\.use: there is no built-in agent 'xyz'"):
        POINT.create(section("xyz"), base_dir=None, key="tool[1]")


def test_a_module_that_does_not_exist() -> None:
    assert refusal(POINT, "no_such_package.agent:Notes") == (
        "agent.use: no_such_package.agent:Notes cannot be imported: there is no module 'no_such_package'; add the "
        "folder that holds it to PYTHONPATH"
    )
    assert "there is no module 'collections.no_such'" in refusal(POINT, "collections.no_such:Notes")


def test_a_module_that_needs_a_module_that_does_not_exist(write: Write) -> None:
    name = write("import no_such_dependency\n")
    assert refusal(POINT, f"{name}:Notes") == (
        f"agent.use: {name}:Notes cannot be imported: it needs the module 'no_such_dependency'"
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\nraise ValueError('bad table')\n", "ValueError: bad table ({name}.py, line 2)"),
        ("x = 1 / 0\n", "ZeroDivisionError: division by zero ({name}.py, line 1)"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("from collections import no_such_name\n", "ImportError: cannot import name 'no_such_name'"),
    ],
)
def test_a_module_that_raises_at_import(
    write: Write, caplog: pytest.LogCaptureFixture, code: str, message: str
) -> None:
    name = write(code)
    text = refusal(POINT, f"{name}:Notes")
    assert text.startswith(f"agent.use: {name}:Notes cannot be imported: {message.format(name=name)}")
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info, "the traceback is in the log"


def test_a_name_that_the_module_does_not_have(write: Write) -> None:
    name = write(GOOD)
    assert refusal(POINT, f"{name}:Note") == (
        f"agent.use: {name}:Note cannot be imported: its module has no 'Note'; did you mean 'Notes'"
    )
    assert refusal(POINT, f"{name}:Zzz") == f"agent.use: {name}:Zzz cannot be imported: its module has no 'Zzz'"


@pytest.mark.parametrize(("code", "kind"), [("def Notes(options): ...\n", "function"), ("Notes = 3\n", "int")])
def test_a_name_that_is_not_a_class(write: Write, code: str, kind: str) -> None:
    name = write(code)
    assert refusal(POINT, f"{name}:Notes") == f"agent.use: {name}:Notes must be a class, got {kind}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    def stop(self): ...\n", "has no method async def run(self, question) -> Episode"),
        ("    async def run(self, question): ...\n", "has no method def stop(self)"),
        ("    run = 3\n    def stop(self): ...\n", "has no method async def run(self, question) -> Episode"),
    ],
)
def test_a_class_without_a_method(write: Write, body: str, message: str) -> None:
    name = write(f"class Notes:\n{body}")
    assert refusal(POINT, f"{name}:Notes") == f"agent.use: {name}:Notes {message}"


def test_an_abstract_method_counts_as_missing(write: Write) -> None:
    name = write("from palimpsest import Workflow\nclass Notes(Workflow):\n    def stop(self): ...\n")
    assert refusal(POINT, f"{name}:Notes") == (
        f"agent.use: {name}:Notes has no method async def run(self, question) -> Episode"
    )


def test_a_method_that_must_be_async(write: Write) -> None:
    name = write("class Notes:\n    def run(self, question): ...\n    def stop(self): ...\n")
    assert refusal(POINT, f"{name}:Notes") == (
        f"agent.use: {name}:Notes.run must be a coroutine function: async def run(self, question) -> Episode"
    )


@pytest.mark.parametrize("options", ["3", "dict", "{'max_turns': 4}"])
def test_options_that_are_not_a_model(write: Write, options: str) -> None:
    name = write(f"class Notes:\n    Options = {options}\n")
    assert refusal(NO_METHODS, f"{name}:Notes") == (
        f"agent.use: {name}:Notes.Options must be a subclass of palimpsest.Options"
    )


def test_an_unknown_option_names_the_closest_and_all_known_keys(write: Write) -> None:
    name = write(GOOD)
    assert refusal(POINT, f"{name}:Notes", max_turn=3) == (
        "agent.max_turn: unknown key; did you mean 'max_turns'; known here: max_turns, file, files, by_name, use"
    )


def test_every_wrong_option_is_named_with_its_value(write: Write) -> None:
    name = write(GOOD)
    text = refusal(POINT, f"{name}:Notes", max_turns="many", zzz=1)
    assert "agent.max_turns: must be a valid integer" in text
    assert "got 'many'" in text
    assert "; agent.zzz: unknown key; known here: " in text


def test_a_class_without_options_accepts_none(write: Write) -> None:
    name = write("class Notes:\n    def __init__(self, options): ...\n")
    NO_METHODS.create(section(f"{name}:Notes"), base_dir=None)
    assert refusal(NO_METHODS, f"{name}:Notes", a=1) == "agent.a: unknown key; known here: use"


def test_a_constructor_that_raises(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    name = write("class Notes:\n    def __init__(self, options):\n        raise KeyError('row')\n")
    assert refusal(NO_METHODS, f"{name}:Notes") == (
        f"agent.use: creating {name}:Notes raised KeyError: 'row' ({name}.py, line 3)"
    )
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info


def test_a_constructor_with_other_arguments(write: Write) -> None:
    name = write("class Notes:\n    def __init__(self): ...\n")
    text = refusal(NO_METHODS, f"{name}:Notes")
    assert text.startswith(f"agent.use: creating {name}:Notes raised TypeError: Notes.__init__() takes 1 positional")


def test_an_error_of_this_project_from_a_constructor_passes_through(write: Write) -> None:
    name = write(
        "from protocol.errors import DataError\n"
        "class Notes:\n    def __init__(self, options):\n        raise DataError('films.jsonl is empty')\n"
    )
    with pytest.raises(DataError, match=r"^films\.jsonl is empty$"):
        NO_METHODS.create(section(f"{name}:Notes"), base_dir=None)


def test_an_extension_is_made_with_its_options_and_resources(write: Write) -> None:
    name = write(GOOD)
    made: Any = POINT.create(section(f"{name}:Notes", max_turns=7), base_dir=None, seed=5)
    assert (made.options.max_turns, made.options.file, made.seed) == (7, Path("default.txt"), 5)


def test_a_nested_class_can_be_named(write: Write) -> None:
    name = write("class Outer:\n    class Notes:\n        def __init__(self, options): ...\n")
    assert NO_METHODS.load(f"{name}:Outer.Notes").__qualname__ == "Outer.Notes"


def test_relative_paths_among_the_options_are_taken_from_base_dir(write: Write, tmp_path: Path) -> None:
    name = write(GOOD)
    given = {"files": ["a.txt", "/abs/b.txt"], "by_name": {"c": "sub/c.txt"}}
    made: Any = POINT.create(section(f"{name}:Notes", **given), base_dir=tmp_path)
    assert made.options.file == tmp_path / "default.txt"
    assert made.options.files == (tmp_path / "a.txt", Path("/abs/b.txt"))
    assert made.options.by_name == {"c": tmp_path / "sub/c.txt"}


def test_a_failing_call_of_an_imported_class_names_it_and_the_error(caplog: pytest.LogCaptureFixture) -> None:
    with (
        pytest.raises(
            ExtensionError, match=r"^agent: the agent my\.code:Mine raised KeyError: 'row' \(test_extensions"
        ),
        NO_METHODS.running("my.code:Mine"),
    ):
        raise KeyError("row")
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info


@pytest.mark.parametrize("use", ["counter", "collections:Counter"])
def test_a_failing_call_of_a_built_in_raises_its_own_error(use: str) -> None:
    with pytest.raises(KeyError), NO_METHODS.running(use):
        raise KeyError("row")


def test_an_error_of_this_project_passes_through_a_call() -> None:
    with pytest.raises(DataError, match=r"^no file$"), NO_METHODS.running("my.code:Mine"):
        raise DataError("no file")
