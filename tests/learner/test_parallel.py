"""Two gloo processes of a torchrun (rank.py) compared with one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from learner.model.export import published_weights
from learner.model.parallel import World, checkpoint_activations, clip_gradients, decoder_layers, join, shard
from protocol.errors import ConfigError
from tests.learner.rank import TRAINERS, Learner, diagnostics_of, train_groups
from tests.learner.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two ranks, and the checkpoint of one process that they resumed from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    learner = Learner(World())
    learner.train(0, 2)
    learner.save(folder / "of-one-rank", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*torchrun, str(ROOT / "tests/learner/rank.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict]:
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> Learner:
    """One process after four steps."""
    learner = Learner(World())
    learner.train(0, 4)
    return learner


def assert_close_to_largest(found: dict[str, Tensor], wanted: dict[str, Tensor], *, bound: float) -> None:
    """Every difference is at most `bound` of the largest number in `wanted`."""
    assert found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values())
    for name, each in wanted.items():
        assert float((found[name] - each).abs().max()) <= bound * largest, name


def test_collectives_reach_every_rank(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["sum"] == [2, 10]
        assert found["bytes"] == [True, True, True]
        assert found["all"] == [True, False, False]
        assert found["reduced"] == pytest.approx((diagnostics_of(0) + diagnostics_of(1)).values(), rel=1e-12)
        assert found["reduced"]["policy/corrected_weight_max"] == 4.0


@pytest.mark.parametrize("name", ["plain", "recomputed"])
def test_two_processes_give_the_gradient_of_one(out: Path, ranks: list[dict], name: str) -> None:
    learner = Learner(World())
    learner.accumulate(0)
    wanted = learner.gradients()
    assert "value_head.bias" in wanted
    assert not any("lm_head" in each for each in wanted)  # tied: its gradient is part of the embedding's
    assert_close_to_largest(load_file(out / f"{name}-gradients.safetensors"), wanted, bound=1e-6)
    norm = clip_gradients(learner.scorer.parameters(), 1.0)
    assert norm > 2.0
    assert ranks[0][f"{name} norm"] == ranks[1][f"{name} norm"] == pytest.approx(norm, rel=1e-6)
    assert_close_to_largest(load_file(out / f"{name}-clipped.safetensors"), learner.gradients(), bound=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_ranks_train_like_one(out: Path, ranks: list[dict], name: str) -> None:
    trainer, stepped = train_groups(TRAINERS[name], World())
    wanted = published_weights(trainer.policy.model, world=World(), dtype=torch.float32)
    assert_close_to_largest(load_file(out / f"{name}.safetensors"), wanted, bound=1e-5)
    assert ranks[0][name] == ranks[1][name]
    for (loss, norm), each in zip(ranks[0][name], stepped, strict=True):
        assert loss == pytest.approx(each.values["learner/loss"], rel=1e-4, abs=1e-6)
        assert norm == pytest.approx(each.values["learner/grad_norm"], rel=1e-4)


def test_clipping_equals_torch_clip_grad_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(8, 8), nn.Linear(8, 8)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    assert clip_gradients(ours.parameters(), 0.5) == float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
    assert ours.weight.grad is not None
    assert theirs.weight.grad is not None
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert clip_gradients(nn.Linear(2, 2).parameters(), 0.5) == 0.0


def test_a_non_finite_gradient_on_one_rank_skips_the_update_on_all(ranks: list[dict]) -> None:
    assert all(math.isnan(found["nan norm"]) for found in ranks)
    assert not ranks[0]["nan changed"]


def test_two_ranks_resume_bit_exactly_each_with_its_own_rng_state(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["state"] == [2, 3, 1]
        assert found["same noise"]
    assert ranks[0]["bit for bit"]
    assert ranks[0]["noise"] != ranks[1]["noise"]


def test_a_checkpoint_of_two_ranks_resumes_on_one(out: Path, alone: Learner) -> None:
    learner = Learner(World())
    learner.restore(out / "of-two-ranks" / "step-00000002")
    learner.train(2, 4)
    assert_close_to_largest(learner.published(), alone.published(), bound=1e-5)
    assert learner.scorer.value_head is not None
    assert alone.scorer.value_head is not None
    torch.testing.assert_close(learner.scorer.value_head.weight, alone.scorer.value_head.weight, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_one_rank_resumes_on_two(out: Path, alone: Learner) -> None:
    assert_close_to_largest(load_file(out / "trained-on.safetensors"), alone.published(), bound=1e-5)


def test_two_ranks_publish_merged_adapters(out: Path) -> None:
    learner = Learner(World(), lora=True)
    base = learner.published()
    learner.train(0, 2)
    wanted = learner.published()
    assert any(not torch.equal(base[name], wanted[name]) for name in base)
    assert_close_to_largest(load_file(out / "adapted.safetensors"), wanted, bound=1e-5)


def test_bf16_training_keeps_weights_and_gradients_in_fp32(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["gradients"] == found["masters"] == ["torch.float32"]
        assert found["bf16 norm"] != found["plain norm"]
        assert found["bf16 norm"] == pytest.approx(found["plain norm"], rel=0.05)
    assert ranks[0]["published"] == ["torch.bfloat16"]
    assert ranks[1]["published"] == []


def test_one_rank_in_bf16_keeps_fp32_weights(ranks: list[dict]) -> None:
    with join("cpu") as world:
        learner = Learner(world, dtype="bfloat16")
        learner.accumulate(0)
        assert {each.dtype for each in learner.gradients().values()} == {torch.float32}
        assert clip_gradients(learner.scorer.parameters(), 1.0) == pytest.approx(ranks[0]["bf16 norm"], rel=0.02)
        small = nn.Linear(2, 2, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"weight must be float32 .* got torch\.bfloat16"):
            shard(small, world, dtype="bfloat16")


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_recomputes_layers_and_dropout_stays_off(recompute: bool) -> None:
    model = tiny_model()
    if recompute:
        checkpoint_activations(model)
    layer = decoder_layers(model)[0]
    calls: list[bool] = []
    mlp, attention = cast(torch.nn.Module, layer.mlp), cast(torch.nn.Module, layer.self_attn)
    mlp.register_forward_pre_hook(lambda *_: calls.append(mlp.training or attention.training))
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum().backward()
    assert calls == [False] * (2 if recompute else 1)


def test_one_rank_in_fp32_is_not_sharded() -> None:
    model = nn.Linear(2, 2)
    shard(model, World(), dtype="float32")
    assert type(model) is nn.Linear


def test_an_unavailable_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"learner\.device 'cuda' cannot be used"), join("cuda"):
        pass
