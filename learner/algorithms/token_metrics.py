"""Metrics of computed tokens (trained tokens that go through the model), one declaration each.

A declaration has the function that computes the metric's values per token.

To add a metric, add one entry to `TOKEN_METRICS`: it is reduced over micro-batches and ranks, written to TensorBoard
and to metrics.jsonl, and documented in docs/metrics.md (`make docs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from torch import Tensor

from protocol.metric import Metric

if TYPE_CHECKING:
    from learner.algorithms.token_data import TokenData

NUM_BUCKETS = 16
"""Number of buckets by age, and by context index; the last bucket holds all larger values."""

_NO_TOKEN = "no token was computed: every advantage is 0, or every token over age"


@dataclass(frozen=True, slots=True, eq=False)
class TokenTerms:
    """Values that the loss computed for N computed tokens of one micro-batch; float [N] unless stated otherwise.

    loss           [], the sum over these tokens
    clipped        bool: whether the clip of the policy loss changes the token's objective
    kl_behavior    k3 estimate of KL(pi_behave || pi_theta)
    kl_reference   estimate of KL(pi_theta || reference); None without a reference
    value_loss     None without a value head
    """

    tokens: TokenData
    loss: Tensor
    clipped: Tensor
    kl_behavior: Tensor
    kl_reference: Tensor | None
    value_loss: Tensor | None

    @property
    def importance_weight(self) -> Tensor:
        """pi_prox / pi_behave, before any correction."""
        return self.tokens.log_importance.exp()

    @property
    def corrected_weight(self) -> Tensor:
        """The importance weight after all corrections."""
        return self.tokens.column("importance")


class Reduction(StrEnum):
    """How the values of tokens become one number per step; docs/metrics.md prints the text."""

    TOTAL = "sum over computed tokens"
    MEAN = "mean over computed tokens"
    MAX = "maximum over computed tokens"
    """The values must be >= 0."""
    MEAN_BY_AGE = "mean over computed tokens of each age"
    MEAN_BY_CONTEXT_INDEX = "mean over computed tokens of each context index"
    EFFECTIVE_FRACTION = "(Σ x)² / (N Σ x²) over N computed tokens"
    """Effective sample size by token, divided by N. Source: Kish 1965."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMetric(Metric):
    """`values` computes [N], or [] for a TOTAL, without gradient; None counts as zeros."""

    reduction: Reduction  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Callable[[TokenTerms], Tensor | None]


TOKEN_METRICS = (
    TokenMetric(
        name="policy/entropy",
        chart="Entropy",
        reduction=Reduction.MEAN,
        unit="nats",
        explanation="−Σ_v π_θ(v) ln π_θ(v), at the sampling temperature",
        healthy="decreases slowly; a fall to 0 before the reward has risen means that the learning rate is too high",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.tokens.entropy,
    ),
    TokenMetric(
        name="policy/clip_fraction",
        chart="Clipped and masked tokens",
        reduction=Reduction.MEAN,
        unit="0–1",
        explanation="fraction of tokens on which the clip is binding: clip(r)·A < r·A",
        healthy="0 with one minibatch (r = 1); below 0.2 with several",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.clipped,
    ),
    TokenMetric(
        name="policy/kl_behavior",
        chart="KL to the behaviour policy and the reference",
        reduction=Reduction.MEAN,
        unit="nats",
        explanation="k3 = e^x − 1 − x with x = ln π_θ − ln π_behave; estimates KL(π_behave ‖ π_θ)",
        healthy="small, increases with staleness; if above 0.1, lower the learning rate or the staleness bound",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.kl_behavior,
    ),
    TokenMetric(
        name="policy/kl_behavior_age_{age}",
        chart="KL to the behaviour policy by age",
        reduction=Reduction.MEAN_BY_AGE,
        unit="nats",
        explanation=f"`policy/kl_behavior` of the tokens of one age ({NUM_BUCKETS - 1}: of that age or older)",
        healthy="almost 0 at age 0, else engine and learner disagree on log-probs; increases with the age. "
        "Must be flat with `--check-drift` (learning rate 0)",
        absent_if="no token of that age was computed",
        values=lambda terms: terms.kl_behavior,
    ),
    TokenMetric(
        name="policy/kl_behavior_context_{context_index}",
        reduction=Reduction.MEAN_BY_CONTEXT_INDEX,
        unit="nats",
        explanation="`policy/kl_behavior` of the contexts at one place in their trajectories, counted from 0 "
        f"({NUM_BUCKETS - 1}: at that place or later)",
        healthy="similar for all; a larger value of later contexts means that the learner trains other token ids than "
        "the engine read",
        absent_if="no token of such a context was computed",
        values=lambda terms: terms.kl_behavior,
    ),
    TokenMetric(
        name="policy/kl_reference",
        chart="KL to the behaviour policy and the reference",
        reduction=Reduction.MEAN,
        unit="nats",
        explanation="estimate of KL(π_θ ‖ reference) by `learner.loss.kl_estimator`; 0 without a reference",
        healthy="increases slowly; a sudden increase means that the text no longer resembles the reference's",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.kl_reference,
    ),
    TokenMetric(
        name="policy/importance_weight_mean",
        chart="Importance weights",
        reduction=Reduction.MEAN,
        unit="–",
        explanation="w = π_prox/π_behave, before any correction",
        healthy="0.95–1.05",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.importance_weight,
    ),
    TokenMetric(
        name="policy/importance_weight_max",
        chart="Importance weights",
        reduction=Reduction.MAX,
        unit="–",
        explanation="w = π_prox/π_behave, before any correction",
        healthy="not far above the bounds of the corrections",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.importance_weight,
    ),
    TokenMetric(
        name="policy/effective_sample_fraction",
        chart="Effective sample fraction",
        reduction=Reduction.EFFECTIVE_FRACTION,
        unit="0–1",
        explanation="effective sample size by token, divided by the number of tokens; x is w = π_prox/π_behave before "
        "any correction, because corrections reduce the mismatch that this metric shows",
        healthy="above 0.9; far below, a few tokens would determine the gradient",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.importance_weight,
    ),
    TokenMetric(
        name="policy/corrected_weight_mean",
        chart="Importance weights",
        reduction=Reduction.MEAN,
        unit="–",
        explanation="w̃: the importance weight after all corrections",
        healthy="0.95–1.05, and exactly 1 without corrections; a decrease means that much is truncated or masked",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.corrected_weight,
    ),
    TokenMetric(
        name="policy/corrected_weight_max",
        chart="Importance weights",
        reduction=Reduction.MAX,
        unit="–",
        explanation="w̃: the importance weight after all corrections",
        healthy="at most the `high` of the corrections",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.corrected_weight,
    ),
    TokenMetric(
        name="policy/corrected_weight_zero_fraction",
        chart="Clipped and masked tokens",
        reduction=Reduction.MEAN,
        unit="0–1",
        explanation="fraction of tokens with w̃ = 0: a correction masked them",
        healthy="below 0.05; 0 if the corrections only truncate",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.corrected_weight == 0,
    ),
    TokenMetric(
        name="learner/loss",
        reduction=Reduction.TOTAL,
        unit="–",
        explanation="the objective; its value carries little information, because A has mean 0",
        healthy="near 0 with one minibatch",
        values=lambda terms: terms.loss,
    ),
    TokenMetric(
        name="learner/value_loss",
        reduction=Reduction.MEAN,
        unit="–",
        explanation="loss of the value head, before its coefficient; 0 unless the estimator is `gae`",
        healthy="decreases, then steady",
        absent_if=_NO_TOKEN,
        values=lambda terms: terms.value_loss,
    ),
)
