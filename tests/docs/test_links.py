"""Relative links in the Markdown documents point at existing files and headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)

_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_point_at_existing_files_and_headings(document: str) -> None:
    broken = [target for target in relative_links(read(ROOT / document)) if not exists(ROOT / document, target)]
    assert not broken, f"{document}: broken links"


def test_the_main_documents_are_checked() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/log.md", "examples/wiki_pool/README.md"} <= set(DOCUMENTS)


def test_link_checks_find_missing_files_and_headings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The lease rule: `slot < (η + 1)`\n\n## Notes\n\n## Notes\n\n```\n# comment\n[a](b.md)\n```\n")
    text = "[x](page.md) [y](#notes) `[z](w.md)` [u](https://example.org/a.md) ![v](page.md#notes-1)"
    assert relative_links(text) == ["page.md", "#notes", "page.md#notes-1"]
    for target in ("page.md", "#notes", "page.md#notes-1", "page.md#the-lease-rule-slot--η--1"):
        assert exists(page, target), target
    for target in ("b.md", "#comment", "page.md#notes-2"):
        assert not exists(page, target), target


def relative_links(text: str) -> list[str]:
    """Returns the targets of all links in Markdown text that are not URLs, code excluded."""
    return [target for target in _LINK.findall(_CODE.sub("", text)) if ":" not in target]


def exists(document: Path, target: str) -> bool:
    """True if the file of `target`, a link in `document`, exists and, for a link to a heading, has that heading."""
    name, _, heading = target.partition("#")
    path = document.parent / name if name else document
    return path.exists() and (not heading or heading in anchors(read(path)))


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of Markdown text."""
    found: set[str] = set()
    fences = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    for title in _HEADING.findall(fences.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        same = [slug, *(f"{slug}-{number}" for number in range(1, len(found) + 1))]
        found.add(next(each for each in same if each not in found))
    return found


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
