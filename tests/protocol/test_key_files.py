"""Secret keys are private from their creation, whatever the umask is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.transport import create_client, create_keys


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    previous = os.umask(0)
    yield
    os.umask(previous)


def test_secret_keys_are_created_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a file that is made private afterwards can be read before")

    monkeypatch.setattr(os, "chmod", fail)
    monkeypatch.setattr(Path, "chmod", fail)
    keys = tmp_path / "keys"
    create_keys(keys)
    create_client(keys, "node-7")
    secrets = sorted(keys.rglob("*.key_secret"))
    assert len(secrets) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in secrets} == {0o700}
