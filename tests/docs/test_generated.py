"""Generated documentation is up to date with the code: `make docs` writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from protocol.config import Config

ROOT = Path(__file__).parents[2]


def test_generated_documents_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_config_key_has_a_description() -> None:
    assert not list(_without_description(Config, "")), "give these keys a Field(description=…)"


def _without_description(model: type[BaseModel], key: str) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if not field.description:
            found.append(f"{key}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _without_description(field.annotation, f"{key}{name}.")
    return found
