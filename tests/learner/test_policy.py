from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.policy import load_policy, token_logprobs
from protocol.errors import DataError
from tests.learner.reference import full_logprobs
from tests.learner.tiny import context, save_tiny_model, tiny_model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padded_rows_equal_a_plain_forward_of_each_context(temperature: float) -> None:
    model = tiny_model()
    rng = np.random.default_rng(0)
    contexts = [context(rng, length=length) for length in (40, 7, 23, 3)]
    token_ids = torch.zeros(4, 40, dtype=torch.int64)
    row, position, target, wanted, entropy = [], [], [], [], []
    for number, each in enumerate(contexts):
        token_ids[number, : len(each)] = torch.from_numpy(each.token_ids)
        for t in np.flatnonzero(each.loss_mask):
            row.append(number)
            position.append(int(t))
            target.append(int(each.token_ids[t]))
            wanted.append(full_logprobs(model, each, temperature=temperature)[t])
            logits = model(input_ids=token_ids[number : number + 1, :t]).logits[0, -1] / temperature
            entropy.append(torch.distributions.Categorical(logits=logits).entropy())
    found, found_entropy = token_logprobs(
        model,
        token_ids=token_ids,
        row=torch.tensor(row),
        position=torch.tensor(position),
        target=torch.tensor(target),
        temperature=temperature,
    )
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_entropy, torch.stack(entropy), rtol=1e-5, atol=1e-5)
    assert found.requires_grad
    assert not found_entropy.requires_grad


def test_logits_are_fp32_for_a_bf16_model() -> None:
    model = tiny_model().to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    one = torch.tensor([0])
    found, _ = token_logprobs(
        model, token_ids=torch.tensor([[1, 2]]), row=one, position=one + 1, target=one + 2, temperature=1.0
    )
    assert found.dtype is torch.float32


def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    policy = load_policy(save_tiny_model(tmp_path))
    for found, wanted in zip(policy.model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert {file.name for file in policy.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json"}
    assert load_policy(tmp_path, dtype="bfloat16").model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config"), ("model.safetensors", "has no weights"), ("tokenizer.json", "has no tokenizer")],
)
def test_a_folder_without_a_part_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    (save_tiny_model(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=message):
        load_policy(tmp_path)


def test_weights_that_do_not_belong_to_the_config_are_refused(tmp_path: Path) -> None:
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
