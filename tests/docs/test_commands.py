"""The commands in the documents exist: subcommands and options of `palimpsest`, targets of make, Python files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest

from learner.launch.cli import cli
from tests.docs.test_links import DOCUMENTS, ROOT, read

HISTORY = {"CHANGELOG.md", "docs/log.md"}
"""They name commands of earlier versions."""
SOURCES = sorted(
    {each for each in DOCUMENTS if each not in HISTORY and "decisions/" not in each}
    | {path.relative_to(ROOT).as_posix() for pattern in ("examples/*/run.toml",) for path in ROOT.glob(pattern)}
    | {"learner/launch/skeleton/run.toml"}
)

_FENCED = re.compile(r"^```[^`\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_ASSIGNMENTS = re.compile(r"^(?:[A-Z_]+=\S+ +)+")
_COMMAND = re.compile(r"^(?:\S*/)?(palimpsest|make|python|tensorboard)(?: |$)")
_PLACEHOLDER = re.compile(r"[A-Z…]")


def commands(document: str, text: str) -> Iterator[list[str]]:
    """The words of every command in code of a Markdown document, or in comments of another file."""
    if document.endswith(".md"):
        lines = [line for block in _FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        lines += _INLINE.findall(_FENCED.sub("", text))
    else:
        lines = [part for line in text.splitlines() if line.startswith("#") for part in re.split(r"[#:] +| {2,}", line)]
    for line in lines:
        command = _ASSIGNMENTS.sub("", line.strip().removeprefix("$ "))
        if _COMMAND.match(command):
            lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;")
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((i for i, word in enumerate(words) if set(word) <= set("|&;")), len(words))
            yield [words[0].rpartition("/")[2], *words[1:end]]


def problem_of(words: list[str]) -> str:
    """What is wrong with a command; empty if nothing is."""
    program, *arguments = words
    if program == "make":
        targets = [argument for argument in arguments if "=" not in argument]
        return ", ".join(f"no target {name}" for name in targets if name not in make_targets())
    if program == "python":
        file = next((each for each in arguments if not each.startswith("-")), "")
        is_of_the_project = file.endswith(".py") and not _PLACEHOLDER.search(file)
        return f"no file {file}" if is_of_the_project and not (ROOT / file).is_file() else ""
    return problem_of_palimpsest(arguments) if program == "palimpsest" else ""


def problem_of_palimpsest(arguments: list[str]) -> str:
    """Whether the subcommand has the options and the number of arguments; values of options are not checked."""
    if not arguments or arguments[0].startswith("-") or _PLACEHOLDER.search(arguments[0]):
        return ""
    name, *rest = arguments
    context = click.Context(cli, info_name="palimpsest")
    command = cli.get_command(context, name)
    if command is None:
        return f"no command {name}"
    options = {option for each in command.params if isinstance(each, click.Option) for option in each.opts}
    unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in options | {"--help"}]
    return ", ".join(f"{name} has no option {word}" for word in unknown)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))


@pytest.mark.parametrize("document", SOURCES)
def test_commands_exist(document: str) -> None:
    found = list(commands(document, read(ROOT / document)))
    problems = {shlex.join(words): problem for words in found if (problem := problem_of(words))}
    assert not problems, document


def test_the_readme_and_the_skeleton_have_commands() -> None:
    for document, at_least in (("README.md", 15), ("learner/launch/skeleton/run.toml", 1), ("docs/chaos.md", 3)):
        assert len(list(commands(document, read(ROOT / document)))) >= at_least, document


def test_wrong_commands_are_found() -> None:
    text = (
        "```\nA=b .venv/bin/palimpsest up run.toml --sett x=1 | tee log   # comment\nmake demos\n```\n"
        "`palimpsest trian RUN` `python docs/nothing.py` `palimpsest audit RUN --json` `make demo` `palimpsest: x`"
    )
    assert [problem_of(words) for words in commands("page.md", text)] == [
        "up has no option --sett",
        "no target demos",
        "no command trian",
        "no file docs/nothing.py",
        "",
        "",
    ]
