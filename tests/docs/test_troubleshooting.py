"""Every message that docs/troubleshooting.md quotes is in the source, word for word; `…` stands for a value."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.test_links import ROOT, read

_ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
PACKAGES = ("actor", "learner", "protocol", "retriever")
MESSAGES = _ROW.findall(read(ROOT / "docs" / "troubleshooting.md"))
VALUE = "…"


@cache
def texts() -> tuple[str, ...]:
    """Every string in the packages' code, docstrings excluded, with VALUE for each formatted value."""
    found: list[str] = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        tree = ast.parse(read(path))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(re.sub(r"%[\d.]*[sdrf]", VALUE, node.value))
    return tuple(found)


def is_in_the_source(message: str) -> bool:
    pattern = re.compile(".*?".join(re.escape(part) for part in message.split(VALUE)), re.DOTALL)
    return any(pattern.search(text) for text in texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_exist(message: str) -> None:
    assert len(message.replace(VALUE, "").strip()) >= 6, "too short to identify a message"
    assert is_in_the_source(message)


def test_other_texts_are_not_found() -> None:
    assert len(MESSAGES) >= 40
    assert not is_in_the_source("no actor is connected to …")
