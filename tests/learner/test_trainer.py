"""The trainer against the slow reference: loss, gradient, and invariance to order and splits."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from learner.batch.flatten import flatten
from learner.batch.microbatches import make_micro_batches
from learner.model.loading import Policy
from learner.training.trainer import Trainer
from protocol.algorithm_config import CorrectionConfig, Scope
from protocol.errors import MalformedMessage
from protocol.learner_config import LearnerConfig, OptimizerConfig
from protocol.types import Status, TrajectoryGroup
from tests.learner.configs import correction, loss_config
from tests.learner.reference import accumulate_reference, frozen, reference_loss, trajectories_of
from tests.learner.tiny import group, tiny_model

TEMPERATURE = 0.7
STEP = 5
AGGREGATIONS = ("trajectory", "context", "token", "constant")
SCOPES: tuple[Scope, ...] = ("token", "context", "trajectory")
CORRECTIONS = (
    None,
    *(correction("truncate", scope=scope, high=1.5) for scope in SCOPES),
    *(correction("mask", scope=scope, low=0.5, high=1.5) for scope in SCOPES),
)

CORRECTION = correction("truncate", high=1.5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(
    *,
    aggregation: str = "trajectory",
    correction: CorrectionConfig | None = CORRECTION,
    minibatches: int = 1,
    budget: int = 64,
    ablation: str = "none",
    optimizer: OptimizerConfig | None = None,
) -> LearnerConfig:
    loss = loss_config(
        aggregation=aggregation,  # pyright: ignore[reportArgumentType]
        constant=20.0,
        minibatches=minibatches,
        clip_low=0.1,
        clip_high=0.15,
        corrections=() if correction is None else (correction,),
    )
    return LearnerConfig(
        staleness_bound=2,
        tokens_per_micro_batch=budget,
        loss=loss,
        ablation=ablation,  # pyright: ignore[reportArgumentType]
        optimizer=optimizer or OptimizerConfig(learning_rate=1e-3),
    )


def trainer_of(model: PreTrainedModel, settings: LearnerConfig) -> Trainer:
    return Trainer(policy=Policy(model=model, tokenizer_files=()), config=settings, temperature=TEMPERATURE)


def uneven_groups() -> list[TrajectoryGroup]:
    """Versions 2..5: some are over age at step 5, bound 2. One trajectory is FAILED; one group has one trajectory."""
    failed = (Status.COMPLETED, Status.FAILED, Status.FORMAT_ERROR, Status.COMPLETED)
    return [
        group(0, versions=(2, 3, 4), cursor=0),
        group(1, versions=(4, 5), statuses=failed, rewards=(1.0, 9.0, 0.0, 0.25), cursor=1),
        group(2, num_contexts=(2,), rewards=(1.0,), versions=(5,), cursor=2),
    ]


def gradient_of(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in model.parameters()]
    )


def fast_gradient(
    model: PreTrainedModel, settings: LearnerConfig, groups: list[TrajectoryGroup]
) -> tuple[torch.Tensor, float]:
    model.zero_grad(set_to_none=True)
    trainer = trainer_of(model, settings)
    batch = flatten(groups, last_context_only=settings.ablation == "last-context")
    plan = trainer.plan(batch, step=STEP)
    columns = trainer.prepare(batch, plan, step=STEP)
    watched = [trainer.accumulate(minibatch, columns) for minibatch in plan.minibatches]
    return gradient_of(model), sum(w.loss for w in watched)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "correction", CORRECTIONS, ids=lambda c: "-".join(map(str, (c.use, *c.options.values()))) if c else "none"
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradient_equal_the_reference(aggregation: str, correction: CorrectionConfig | None) -> None:
    groups = uneven_groups()
    settings = config(aggregation=aggregation, correction=correction)
    model = tiny_model(dtype=torch.float64)
    found, loss = fast_gradient(model, settings, groups)

    model.zero_grad(set_to_none=True)
    now = frozen(model, temperature=TEMPERATURE)
    reference = reference_loss(trajectories_of(groups), step=STEP, current=now, proximal=now, config=settings)
    accumulate_reference(model, reference, temperature=TEMPERATURE)

    assert gradient_of(model).norm() > 1e-3
    assert loss == pytest.approx(reference.loss, rel=1e-5, abs=1e-9)
    assert distance(found, gradient_of(model)) < 1e-5


@pytest.mark.parametrize("scope", ["token", "trajectory"])
def test_several_minibatches_equal_a_reference_loop_with_a_fixed_proximal_policy(scope: str) -> None:
    groups = uneven_groups()
    optimizer = OptimizerConfig(learning_rate=0.02, eps=1e-2, weight_decay=0.1, clip_norm=0.5)
    truncate = correction("truncate", scope=scope, high=1.5)
    settings = config(minibatches=3, correction=truncate, optimizer=optimizer)
    model, plain = (tiny_model(dtype=torch.float64) for _ in range(2))
    trainer = trainer_of(model, settings)
    metrics = trainer.train_step(groups, step=STEP)
    assert metrics.values["policy/clip_fraction"] > 0.05

    judge = trainer_of(plain, settings)
    everything = trajectories_of(groups)
    proximal = frozen(plain, temperature=TEMPERATURE, contexts=[c for t, _ in everything for c in t.contexts])
    for part in np.array_split(np.arange(len(everything)), 3):
        reference = reference_loss(
            [everything[i] for i in part],
            step=STEP,
            current=frozen(plain, temperature=TEMPERATURE),
            proximal=proximal,
            config=settings,
        )
        accumulate_reference(plain, reference, temperature=TEMPERATURE)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), optimizer.clip_norm)
        judge.optimizer.step()
        judge.optimizer.zero_grad()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("scope", ["token", "context", "trajectory"])
def test_gradient_does_not_depend_on_the_split_into_micro_batches(scope: str, dtype: torch.dtype, bound: float) -> None:
    """Up to rounding: fp32 differs from fp64 by 1e-6 here."""
    truncate = correction("truncate", scope=scope, high=1.5)
    model = tiny_model(dtype=dtype)
    wanted, _ = fast_gradient(model, config(correction=truncate, budget=100_000), uneven_groups())
    for budget in (1, 33, 90, 300):
        found, _ = fast_gradient(model, config(correction=truncate, budget=budget), uneven_groups())
        assert distance(found, wanted) < bound


def test_gradient_does_not_depend_on_order_and_grouping_of_contexts() -> None:
    """Random partitions that ignore trajectories, lengths and common prefixes, in random order."""
    model = tiny_model(dtype=torch.float64)
    settings = config(budget=100_000)
    groups = uneven_groups()
    wanted, _ = fast_gradient(model, settings, groups)
    trainer = trainer_of(model, settings)
    batch = flatten(groups)
    plan = trainer.plan(batch, step=STEP)
    columns = trainer.prepare(batch, plan, step=STEP)
    trained = np.flatnonzero(plan.trained)
    rng = np.random.default_rng(3)
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        owner = rng.integers(0, 5, size=batch.num_contexts)
        for number in rng.permutation(5):
            chosen = trained[owner[batch.sampled.context[trained]] == number]
            (part,) = make_micro_batches(batch, tokens=chosen, tokens_per_micro_batch=10_000)
            trainer.accumulate([part], columns)
        assert distance(gradient_of(model), wanted) < 1e-12


def test_groups_that_failed_have_one_trajectory_or_equal_rewards_give_gradient_zero() -> None:
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    flat = group(0, rewards=(0.3, 0.3, 0.3, 0.3))
    single = group(1, num_contexts=(2,), rewards=(1.0,))
    failed = group(2, statuses=(Status.FAILED,) * 4)
    for groups in ([flat], [single], [failed], [flat, single, failed], []):
        values = trainer_of(model, config()).train_step(groups, step=0).values
        assert values["learner/grad_norm"] == 0.0
        assert values["learner/loss"] == 0.0
        assert values["learner/skipped_updates"] == 0
        assert np.isfinite(list(values.values())).all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_over_age_tokens_give_gradient_zero_and_are_counted() -> None:
    model = tiny_model()
    values = trainer_of(model, config()).train_step([group(0, versions=(1,))], step=9).values
    for tag in ("learner/trained_tokens", "learner/trained_contexts", "learner/grad_norm", "learner/loss"):
        assert values[tag] == 0
    assert values["staleness/over_age_tokens"] == sum(c.num_trained_tokens for c in group(0).contexts())


def test_a_correction_that_drops_every_token_gives_gradient_zero() -> None:
    masked = correction("mask", low=1e8, high=1e9)
    metrics = trainer_of(tiny_model(), config(correction=masked)).train_step([group(0)], step=0)
    assert metrics.values["learner/grad_norm"] == 0.0
    assert metrics.values["policy/corrected_weight_zero_fraction"] == 1.0


def test_a_trajectory_has_the_same_weight_for_any_number_of_contexts() -> None:
    """Rewards [1 with 3 contexts, 0 with 1 context]: the baseline is 0.5, and weights sum to 1/2 each."""
    batch = flatten([group(4, num_contexts=(3, 1), rewards=(1.0, 0.0))])
    trainer = trainer_of(tiny_model(), config())
    plan = trainer.plan(batch, step=0)
    columns = trainer.prepare(batch, plan, step=0)
    owner = torch.from_numpy(batch.sampled.trajectory)
    for trajectory, centred in ((0, 0.5), (1, -0.5)):
        assert float(columns.weight[owner == trajectory].sum()) == pytest.approx(0.5)
        advantage = columns.advantages[owner == trajectory]
        assert advantage.tolist() == pytest.approx([centred / (np.std([1, 0], ddof=1) + 1e-6)] * len(advantage))


def test_masked_tokens_do_not_change_the_weight_of_the_others() -> None:
    batch = flatten([group(0, versions=(2, 5))])
    for aggregation in AGGREGATIONS:
        trainer = trainer_of(tiny_model(), config(aggregation=aggregation))
        everything, young = trainer.plan(batch, step=5), trainer.plan(batch, step=6)
        assert 0 < young.num_over_age < len(batch.sampled)
        assert np.array_equal(everything.weight, young.weight)
        trained = sum(len(part.tokens) for minibatch in young.minibatches for part in minibatch)
        assert trained == len(batch.sampled) - young.num_over_age


def test_the_last_context_ablation_trains_only_last_contexts() -> None:
    model = tiny_model()
    found, _ = fast_gradient(model, config(ablation="last-context"), [group(0, versions=(5,))])
    cut = group(0, versions=(5,))
    last = tuple(dataclasses.replace(t, contexts=t.contexts[-1:]) for t in cut.trajectories)
    wanted, _ = fast_gradient(model, config(), [dataclasses.replace(cut, trajectories=last)])
    assert torch.equal(found, wanted)
    everything, _ = fast_gradient(model, config(), [cut])
    assert distance(found, everything) > 0.1


def test_a_non_finite_gradient_skips_the_update_and_is_counted() -> None:
    model = tiny_model()
    trainer = trainer_of(model, config())
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    metrics = trainer.train_step([group(0, versions=(5,))], step=5)
    assert (metrics.values["learner/skipped_updates"], trainer.guard.num_skipped) == (1, 1)
    for found, wanted in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is None for p in model.parameters())


def test_metrics_count_what_was_trained() -> None:
    groups = uneven_groups()
    metrics = trainer_of(tiny_model(), config()).train_step(groups, step=STEP)
    tokens = [span.version for g in groups for t in g.trajectories if t.status is not Status.FAILED
              for c in t.contexts for span in c.policy_versions for _ in range(span.start, span.end)]  # fmt: skip
    trained = [v for v in tokens if v >= STEP - 2]
    values = metrics.values
    assert values["learner/trained_tokens"] == len(trained)
    assert values["staleness/over_age_tokens"] == len(tokens) - len(trained)
    assert metrics.tokens_by_age == Counter(STEP - v for v in trained)
    assert sum(metrics.tokens_by_context.values()) == len(trained)
    assert values["staleness/max"] == 2
    assert values["staleness/mean"] == pytest.approx(np.mean(STEP - np.array(trained)))
    assert values["learner/trained_trajectories"] == 8
    assert 0 < values["learner/unique_fraction"] <= 1
    for tag, members in (("policy/kl_behavior_age_", metrics.tokens_by_age), ("policy/kl_behavior_context_", range(4))):
        assert {name for name in values if name.startswith(tag)} == {f"{tag}{member}" for member in members}
    assert 0 < values["policy/effective_sample_fraction"] <= 1
    assert values["policy/entropy"] > 0
    assert values["learner/step_s"] >= values["learner/forward_s"] + values["learner/backward_s"]
    assert values["policy/corrected_weight_mean"] <= 1.5


def test_tokens_of_a_later_version_than_the_step_are_refused() -> None:
    with pytest.raises(MalformedMessage, match="<= the learner's step 3, got 4"):
        trainer_of(tiny_model(), config()).train_step([group(0, versions=(4,))], step=3)


def test_training_raises_the_probability_of_rewarded_tokens() -> None:
    model = tiny_model()
    groups = [group(0, versions=(0,))]
    trainer = trainer_of(model, config(optimizer=OptimizerConfig(learning_rate=1e-3)))
    best, worst = groups[0].trajectories[0].contexts[0], groups[0].trajectories[1].contexts[0]

    def score() -> float:
        logprobs = frozen(model, temperature=1.0)
        return float(logprobs(best)[best.loss_mask].mean() - logprobs(worst)[worst.loss_mask].mean())

    before = score()
    for _ in range(5):
        trainer.train_step(groups, step=0)
    assert score() > before
