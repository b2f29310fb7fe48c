"""Compares two identities of a run (`protocol.run_identity`), and names each config key that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

CONTENT = "$content"
"""`{CONTENT: digest}` is a leaf: the digest of a file, of a folder or of a long text."""
MISSING = "$missing"
"""`{MISSING: digest of its name}` is a leaf: a file that this host does not have. It agrees with every content."""
MAX_SECTION_CHARS = 4_096
"""A section with a longer text is represented by its digest."""
# Characters of a value in a message.
_MAX_SHOWN_CHARS = 80


def differences(
    expected: Mapping[str, str], found: Mapping[str, str], *, what: str = "this actor", reference: str = "the run"
) -> list[str]:
    """One clause for each key of the run's identity `expected` that `found` does not agree with; empty if all agree.

    `what` has the identity `found`: "this actor", "this config"; `reference` has `expected`. Only the sections of
    `expected` are compared.
    """
    problems: list[str] = []
    for section, text in expected.items():
        other = found.get(section)
        if other == text:
            continue
        ours, theirs = _parsed(text), _parsed(other)
        if not _is_table(ours) or not _is_table(theirs):
            problems += [clause] if (clause := _difference(section, ours, theirs, (reference, what))) else []
            continue
        run, here = dict(_leaves(ours, section)), dict(_leaves(theirs, section))
        for key in dict.fromkeys([*run, *here]):
            clause = _difference(key, run.get(key), here.get(key), (reference, what))
            problems += [clause] if clause else []
    return problems


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and not {CONTENT, MISSING} & value.keys()


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of each leaf: a value, or a list of values. Elements of a list of tables or files are `key[i]`."""
    if _is_table(value):
        for name, each in value.items():
            yield from _leaves(each, f"{key}.{name}")
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for i, each in enumerate(value):
            yield from _leaves(each, f"{key}[{i}]")
    else:
        yield key, value


def _difference(key: str, ours: Any, theirs: Any, owners: tuple[str, str]) -> str:
    """The clause for one key; empty if the values agree, or if one side lacks the file."""
    reference, what = owners
    if ours == theirs or (_kind(ours), _kind(theirs)) in ((CONTENT, MISSING), (MISSING, CONTENT)):
        return ""
    if _kind(ours) or _kind(theirs):
        return f"{key}: the content differs between {reference} and {what}"
    return f"{key}: {reference} has {_shown(ours)}, {what} has {_shown(theirs)}"


def _kind(value: Any) -> str:
    return next(iter(value)) if isinstance(value, dict) and len(value) == 1 and not _is_table(value) else ""


def _shown(value: Any) -> str:
    return "no value" if value is None else f"{json.dumps(value):.{_MAX_SHOWN_CHARS}}"
