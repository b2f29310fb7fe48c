"""The launcher gives the engines of a run a token of their own on loopback (B4)."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from learner.launch.engine_token import with_engine_token
from protocol.config import Config, EngineConfig, ModelConfig, NetworkConfig
from protocol.errors import DataError, SecurityError


def config(*, count: int = 1, api_key_file: Path | None = None) -> Config:
    network, engine = NetworkConfig(api_key_file=api_key_file), EngineConfig(count=count)
    return Config(model=ModelConfig(path=Path("model")), network=network, engine=engine)


def test_each_start_writes_a_new_token_that_only_this_user_can_read(tmp_path: Path) -> None:
    path = tmp_path / "engine.token"
    keys = set()
    for _ in range(2):
        made = with_engine_token(config(), path)
        assert made.network.api_key_file == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        keys.add(made.network.api_key())
    assert len(keys) == 2
    assert all(key is not None and len(key) >= 32 for key in keys)


def test_a_token_of_the_config_is_kept_and_a_run_without_own_engines_gets_none(tmp_path: Path) -> None:
    own = config(api_key_file=tmp_path / "own")
    assert with_engine_token(own, tmp_path / "engine.token") is own
    assert with_engine_token(config(count=0), tmp_path / "engine.token").network.api_key_file is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "mode", "error", "message"),
    [
        (b"", 0o600, DataError, "must hold one word"),
        (b" \n", 0o600, DataError, "must hold one word"),
        (b"two words", 0o600, DataError, "must hold one word"),
        (b"\xff\xfe", 0o600, DataError, "it is not text"),
        (b"secret", 0o640, SecurityError, "chmod 600"),
        (b"secret", 0o604, SecurityError, "chmod 600"),
    ],
)
def test_a_token_file_that_is_empty_or_can_be_read_by_others_is_refused(
    tmp_path: Path, content: bytes, mode: int, error: type[Exception], message: str
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(error, match=message):
        NetworkConfig(api_key_file=path).api_key()
