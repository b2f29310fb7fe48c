"""Losses and their metrics against the slow reference and hand-computed values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.diagnostics import Diagnostics
from learner.algorithms.losses import (
    approx_kl,
    cispo,
    clipped_surrogate,
    sequence_log_ratio,
    value_loss,
)
from learner.algorithms.token_data import TokenData
from learner.algorithms.token_metrics import NUM_BUCKETS
from protocol.algorithm_config import LossConfig, ValueConfig
from tests.learner.configs import loss_config, loss_of
from tests.learner.flat import flat_tokens
from tests.learner.properties import deterministic
from tests.learner.reference import reference_objective

CONFIGS = [
    loss_config(clip_low=0.1, clip_high=0.3),
    loss_config(clip_low=0.1, clip_high=0.3, dual_clip=1.2),
    loss_config(use="gspo", clip_low=0.1, clip_high=0.05),
    loss_config(use="cispo", clip_low=0.1, clip_high=0.2),
    loss_config(kl_coefficient=0.3, kl_estimator="k1"),
    loss_config(kl_coefficient=0.3, kl_estimator="k2"),
    loss_config(kl_coefficient=0.3, kl_estimator="k3"),
    loss_config(kl_coefficient=0.3, kl_in="reward"),
]


def gradient(loss: torch.Tensor, of: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(loss, of)[0].numpy()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_dump_json(exclude_defaults=True))
@settings(deterministic, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_loss_and_gradient_equal_the_reference(config: LossConfig, seed: int) -> None:
    flat = flat_tokens(seed)
    importance = torch.from_numpy(np.random.default_rng(seed).choice([0.0, 0.5, 2.0], size=len(flat.tokens)))
    tokens = flat.loss_tokens(importance=importance)
    loss, found = loss_of(tokens, config)
    wanted, slopes = reference_objective(
        flat.tokens,
        flat.logprobs.tolist(),
        flat.proximal.tolist(),
        flat.reference.tolist(),
        flat.weight.tolist(),
        importance.tolist(),
        config,
    )
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(gradient(loss, tokens.column("logprobs")), slopes, rtol=1e-5, atol=1e-8)
    assert found.loss == pytest.approx(wanted if len(flat.tokens) else 0.0, rel=1e-9, abs=1e-9)


def test_each_token_is_clipped_by_the_sign_of_its_own_advantage() -> None:
    """r = 1.5 with A = +1 and -1 gives -1.2 + 1.5, not 0."""
    ratio = torch.tensor([1.5, 1.5], dtype=torch.float64)
    loss, clipped = clipped_surrogate(ratio.log(), torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5])
    assert clipped.tolist() == [True, False]


def test_dual_clip_binds_only_on_negative_advantages() -> None:
    ratio = torch.tensor([10.0, 10.0, 2.0, 0.1], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    loss, clipped = clipped_surrogate(ratio.log(), advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.2, 2.0, 0.8])
    assert clipped.tolist() == [True, True, False, True]


def test_gspo_gives_every_token_of_a_context_the_sequence_ratio_and_gradient() -> None:
    """d/d log pi_t of sum_t w s A with s = (prod r)^(1/3) is w s A for each of the three tokens."""
    logprobs = torch.tensor([0.1, -0.2, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    context = torch.tensor([0, 0, 0, 2])
    log_ratio = sequence_log_ratio(logprobs, context)
    assert log_ratio.tolist() == pytest.approx([0.1, 0.1, 0.1, 1.0])
    found = gradient(log_ratio.exp().sum(), logprobs)
    geometric = torch.stack([3 * logprobs[:3].mean().exp(), logprobs[3].exp()]).sum()
    np.testing.assert_allclose(found, gradient(geometric, logprobs))


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    ratio = torch.tensor([3.0, 0.1, 1.1], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    loss, clipped = cispo(logprobs, logprobs, torch.tensor([1.0, 1.0, -2.0]), clip_low=0.5, clip_high=0.2)
    np.testing.assert_allclose(gradient(loss.sum(), logprobs), [-1.2, -0.5, 2.2])
    assert clipped.tolist() == [True, True, False]


def test_entropy_and_value_terms() -> None:
    tokens = flat_tokens(1).loss_tokens()
    num = len(tokens.column("logprobs"))
    assert num > 3
    entropy = torch.rand(num, dtype=torch.float64, requires_grad=True)
    values = torch.linspace(-1, 1, num, dtype=torch.float64, requires_grad=True)
    returns = torch.linspace(1, 0, num, dtype=torch.float64)
    plain, _ = loss_of(tokens, loss_config())
    full = dataclasses.replace(
        tokens, entropy=entropy, values=values, old_values=torch.zeros_like(returns), returns=returns
    )
    loss, found = loss_of(full, loss_config(entropy_coefficient=0.1, value=ValueConfig(coefficient=0.25, clip=0.2)))
    errors = torch.maximum((values - returns) ** 2, (values.clamp(-0.2, 0.2) - returns) ** 2) / 2
    wanted = plain + (tokens.weight * (0.25 * errors - 0.1 * entropy)).sum()
    torch.testing.assert_close(loss, wanted)
    np.testing.assert_allclose(gradient(loss, entropy), -0.1 * tokens.weight)
    values_of = found.values()
    assert values_of["learner/value_loss"] == pytest.approx(errors.mean().item())
    assert values_of["policy/entropy"] == pytest.approx(entropy.mean().item())


def test_value_clip_never_lowers_the_loss() -> None:
    values, returns = torch.tensor([1.0, 1.0, 0.1, -1.0]), torch.tensor([2.0, 0.0, 1.0, -2.0])
    old = torch.zeros(4)
    assert value_loss(values, old, returns).tolist() == pytest.approx([0.5, 0.5, 0.405, 0.5])
    assert value_loss(values, old, returns, clip=0.2).tolist() == pytest.approx([1.62, 0.5, 0.405, 1.62])


def test_a_loss_term_without_its_columns_is_refused() -> None:
    tokens = dataclasses.replace(flat_tokens(1).loss_tokens(), reference=None)
    with pytest.raises(ValueError, match=r"kl_coefficient = 0.1 needs reference \[N\], got None"):
        loss_of(tokens, loss_config(kl_coefficient=0.1))
    loss_of(tokens, loss_config(kl_coefficient=0.1, kl_in="reward"))
    with pytest.raises(ValueError, match=r"values \[N\] need old_values"):
        loss_of(dataclasses.replace(tokens, values=tokens.weight), loss_config())


def test_diagnostics_sum_over_any_split() -> None:
    flat = flat_tokens(3)
    importance = torch.linspace(0, 2, len(flat.tokens), dtype=torch.float64)
    _, whole = loss_of(flat.loss_tokens(importance=importance), loss_config())
    parts = []
    for trajectory in (0, 1, 2, 7):
        at = [n for n, token in enumerate(flat.tokens) if token.trajectory == trajectory]
        parts.append(loss_of(flat.select(at).loss_tokens(importance=importance[at]), loss_config())[1])
    for found in (sum(parts, Diagnostics()), Diagnostics.from_tensors(*whole.to_tensors())):
        for tensor, wanted in zip(found.to_tensors(), whole.to_tensors(), strict=True):
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=0)
        assert found.values() == pytest.approx(whole.values(), rel=1e-12)


def test_diagnostics_equal_means_over_the_tokens() -> None:
    flat = flat_tokens(3)
    num = len(flat.tokens)
    importance = torch.linspace(0, 2, num, dtype=torch.float64)
    tokens = flat.loss_tokens(importance=importance)
    _, found = loss_of(tokens, loss_config(clip_low=0.1, clip_high=0.1))
    logprobs = tokens.column("logprobs").detach()
    kl = (logprobs - tokens.behavior).exp() - 1 - (logprobs - tokens.behavior)
    assert found.num_tokens == num
    assert tokens.reference is not None
    weight = (tokens.column("proximal") - tokens.behavior).exp()
    wanted = {
        "learner/loss": found.loss,
        "learner/value_loss": 0.0,
        "policy/entropy": tokens.column("entropy").mean(),
        "policy/clip_fraction": clipped_of(tokens).double().mean(),
        "policy/kl_behavior": kl.mean(),
        "policy/kl_reference": approx_kl(logprobs, tokens.reference).mean(),
        "policy/importance_weight_mean": weight.mean(),
        "policy/importance_weight_max": weight.max(),
        "policy/effective_sample_fraction": weight.sum() ** 2 / (num * (weight**2).sum()),
        "policy/corrected_weight_mean": 1.0,
        "policy/corrected_weight_max": 2.0,
        "policy/corrected_weight_zero_fraction": 1 / num,
    }
    for tag, index, counts in (
        ("policy/kl_behavior_age_", tokens.age, found.tokens_by_age),
        ("policy/kl_behavior_context_", tokens.context_index, found.tokens_by_context_index),
    ):
        for bucket in range(NUM_BUCKETS):
            inside = index == bucket if bucket < NUM_BUCKETS - 1 else index >= bucket
            assert counts[bucket] == inside.sum()
            if inside.any():
                wanted[f"{tag}{bucket}"] = kl[inside].mean()
    assert int(tokens.age.max()) >= NUM_BUCKETS
    assert found.values() == pytest.approx({tag: float(value) for tag, value in wanted.items()})


def clipped_of(tokens: TokenData) -> torch.Tensor:
    ratio, a = (tokens.column("logprobs") - tokens.column("proximal")).exp(), tokens.advantages
    return ((a > 0) & (ratio > 1.1)) | ((a < 0) & (ratio < 0.9))


def test_on_policy_gradient_is_minus_weight_times_advantage() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages, weight = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.25, 0.25])
    index = torch.zeros(3, dtype=torch.int64)
    for name in ("ppo", "cispo"):
        tokens = TokenData(
            logprobs=logprobs,
            entropy=torch.tensor([1.0, 2.0, 3.0]),
            proximal=logprobs.detach(),
            behavior=logprobs.detach(),
            importance=torch.ones(3),
            advantages=advantages,
            weight=weight,
            context=index,
            age=index,
            trajectory=index,
            context_index=index,
        )
        loss, found = loss_of(tokens, loss_config(use=name))
        np.testing.assert_allclose(gradient(loss, logprobs), -weight * advantages)
        values = found.values()
        assert (values["policy/clip_fraction"], values["policy/kl_behavior"]) == (0.0, 0.0)
        assert (found.num_tokens, values["policy/corrected_weight_max"]) == (3, 1.0)
        assert values["policy/entropy"] == pytest.approx(2.0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_dump_json(exclude_defaults=True))
def test_no_tokens_give_zero_and_a_gradient(config: LossConfig) -> None:
    tokens = flat_tokens(0).select([]).loss_tokens()
    loss, found = loss_of(tokens, config)
    loss.backward()
    assert (float(loss.detach()), found.num_tokens) == (0.0, 0)
    assert set(found.values().values()) == {0.0}


def test_k3_is_unbiased_and_never_negative() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, dtype=torch.float64).log_softmax(0) for _ in range(2))
    per_token = approx_kl(p, q)
    assert (per_token >= 0).all()
    torch.testing.assert_close((p.exp() * per_token).sum(), (p.exp() * (p - q)).sum())


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of k1, k2, k3, got 'k4'"):
        approx_kl(torch.zeros(1), torch.zeros(1), estimator="k4")  # pyright: ignore[reportArgumentType]
