from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from learner.training.optimizer import SkipGuard, apply_update, build_optimizer, learning_rate, value_learning_rate
from protocol.errors import DivergenceError
from protocol.learner_config import OptimizerConfig


def test_warm_up_then_linear_decay_to_a_fraction() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(step, num_steps=104, config=config) for step in (0, 3, 4, 54, 104, 500)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1, 0.1])
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(step, num_steps=10, config=constant) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]


def test_cosine_falls_slowly_then_fast_then_slowly_to_its_floor() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=10, final_fraction=0.25)
    rates = [learning_rate(step, num_steps=110, config=config) for step in (4, 9, 10, 35, 60, 85, 110, 200)]
    half = 2.0 * 0.75 / 2
    quarter = half * math.sqrt(0.5)
    middle = 2.0 - half
    assert rates == pytest.approx([1.0, 2.0, 2.0, middle + quarter, middle, middle - quarter, 0.5, 0.5])


def test_one_update_by_hand() -> None:
    """AdamW's first step is -rate * sign(g); matrices decay, biases do not; the gradient is clipped and cleared."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5, eps=1e-12))
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([-4.0])
    assert apply_update(model, optimizer, rate=0.1, clip_norm=1.0) == pytest.approx(5.0)
    assert float(model.weight.detach()) == pytest.approx(1.0 * (1 - 0.1 * 0.5) - 0.1)
    assert float(model.bias.detach()) == pytest.approx(1.1)
    assert optimizer.state[model.weight]["exp_avg"].item() == pytest.approx(0.1 * 0.6)
    assert model.weight.grad is None


class WithValueHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(2, 2)
        self.value_head = nn.Linear(2, 1)


@pytest.mark.parametrize("value_rate", [0.0, 0.3, None])
def test_the_value_head_has_its_own_learning_rate(value_rate: float | None) -> None:
    """AdamW's first step moves every parameter by its learning rate."""
    model = WithValueHead()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(eps=1e-12))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    apply_update(model, optimizer, rate=0.1, value_rate=value_rate, clip_norm=100.0)
    for name, parameter in model.named_parameters():
        rate = value_rate if name.startswith("value_head") and value_rate is not None else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] - rate, rtol=1e-5, atol=1e-6)


def test_the_value_heads_rate_follows_the_schedule() -> None:
    config = OptimizerConfig(
        learning_rate=0.0, value_learning_rate=2.0, schedule="linear", warmup_steps=4, final_fraction=0.1
    )
    rates = [value_learning_rate(step, num_steps=104, config=config) for step in (0, 3, 54, 104)]
    assert rates == pytest.approx([0.5, 2.0, 1.1, 0.2])
    assert learning_rate(54, num_steps=104, config=config) == 0.0
    shared = OptimizerConfig(learning_rate=1.0)
    assert value_learning_rate(3, num_steps=10, config=shared) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(bad: float) -> None:
    model = nn.Linear(1, 1)
    before = [p.clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0))
    model.weight.grad, model.bias.grad = torch.tensor([[bad]]), torch.tensor([1.0])
    assert not math.isfinite(apply_update(model, optimizer, rate=1.0, clip_norm=1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_a_non_finite_loss_changes_nothing_and_clears_the_gradient() -> None:
    model = nn.Linear(1, 1)
    before = [p.clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0))
    model.weight.grad = torch.ones(1, 1)
    assert math.isnan(apply_update(model, optimizer, rate=1.0, clip_norm=1.0, loss_is_finite=False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.weight.grad is None
    assert not optimizer.state


def test_consecutive_skips_end_the_run_and_a_finite_update_resets_the_count() -> None:
    guard = SkipGuard(max_consecutive=3, num_skipped=4, num_consecutive=2)
    guard.record(1.0)
    for norm in (math.nan, math.inf):
        guard.record(norm)
    assert (guard.num_skipped, guard.num_consecutive) == (6, 2)
    with pytest.raises(DivergenceError, match=r"the last 3 updates .*max_consecutive_skips is 3"):
        guard.record(math.nan)
    assert (guard.num_skipped, guard.num_consecutive) == (7, 3)
