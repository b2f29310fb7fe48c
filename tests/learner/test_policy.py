from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from learner.model.loading import load_policy
from protocol.errors import DataError
from tests.learner.tiny import save_tiny_model, tiny_model


def test_a_saved_folder_loads_with_the_same_weights(tmp_path: Path) -> None:
    policy = load_policy(save_tiny_model(tmp_path))
    for found, wanted in zip(policy.model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert {file.name for file in policy.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json"}
    assert policy.model.dtype is torch.float32


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config"), ("model.safetensors", "has no weights"), ("tokenizer.json", "has no tokenizer")],
)
def test_a_folder_with_a_missing_part_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    (save_tiny_model(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=message):
        load_policy(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    config = json.loads((save_tiny_model(tmp_path) / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"missing or of another shape, the first is model\.layers\.2"):
        load_policy(tmp_path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (save_tiny_model(tmp_path) / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_policy(tmp_path)
