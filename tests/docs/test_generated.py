"""Generated documentation is up to date with the code: `make docs` writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from learner.metrics import document as metrics_document

ROOT = Path(__file__).parents[2]
GENERATED: dict[str, Callable[[], str]] = {"docs/metrics.md": metrics_document.render}


@pytest.mark.parametrize("path", GENERATED)
def test_a_generated_document_is_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == GENERATED[path](), f"{path} is outdated: run `make docs`"
