"""The metrics of one training step that the trainer measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learner.algorithms.diagnostics import Diagnostics
from learner.algorithms.token_metrics import NUM_BUCKETS
from learner.batch.flatten import Batch
from learner.batch.microbatches import StepPlan
from protocol.metric import Metric

STALENESS_METRICS = (
    Metric(
        name="staleness/mean",
        chart="Age of trained tokens in steps",
        reduction="mean over trained tokens",
        unit="steps",
        explanation="age of a token: step − version that sampled it",
        healthy="between 0 and the bound; 0 at every step means synchronous training",
    ),
    Metric(
        name="staleness/max",
        chart="Age of trained tokens in steps",
        reduction="maximum over trained tokens",
        unit="steps",
        explanation="age of a token: step − version that sampled it",
        healthy="never above `learner.staleness_bound`, which the lease rule enforces",
    ),
    Metric(
        name="staleness/histogram",
        reduction="count of trained tokens by age",
        unit="tokens",
        explanation="number of trained tokens of each age; `tokens_by_age` in metrics.jsonl",
        healthy="most tokens at ages from 1 to the bound, stable over time",
        absent_if="no token was trained",
        kind="histogram",
    ),
    Metric(
        name="staleness/over_age_tokens",
        chart="Tokens over the bound",
        reduction="count over the batch",
        unit="tokens",
        explanation="sampled tokens older than the bound: masked, but counted in the loss's denominator",
        healthy="0 unless stragglers are overtaken (`learner.straggler_timeout_s`); then far below 1 % of the tokens",
    ),
)

STEP_METRICS = (
    Metric(
        name="learner/advantage_mean",
        chart="Mean advantage",
        reduction="mean over sampled tokens",
        unit="–",
        explanation="A; 0 for tokens that are not trained",
        healthy="near 0; far from it, long trajectories are worse (or better) than short ones",
    ),
    Metric(
        name="learner/grad_norm",
        chart="Gradient norm",
        reduction="mean over minibatches",
        unit="–",
        explanation="L2 norm of the gradient before clipping",
        healthy="steady; look at peaks above ten times the median",
    ),
    Metric(
        name="learner/learning_rate",
        chart="Learning rate",
        reduction="value of the step",
        unit="–",
        explanation="learning rate of this step's updates",
        healthy="follows the schedule",
    ),
    Metric(
        name="learner/skipped_updates",
        chart="Skipped updates",
        reduction="count over minibatches",
        unit="updates",
        explanation="updates that were skipped because their gradient was not finite",
        healthy="0",
    ),
    Metric(
        name="learner/trained_tokens",
        chart="Trained tokens of a step",
        reduction="count over the batch",
        unit="tokens",
        explanation="trained tokens of the step",
    ),
    Metric(
        name="learner/skipped_tokens",
        reduction="ratio of counts over the batch",
        unit="0–1",
        explanation="trained tokens that did not go through the model, divided by trained tokens: all advantages of "
        "their contexts are 0, so their gradient is 0 (`learner.skip_zero_advantage`). They count in the loss's "
        "denominators and in all `learner/trained_` and `staleness/` metrics",
        healthy="the fraction of groups of equal rewards: increases as questions are always or never answered; near "
        "1, almost nothing is learned from a batch",
    ),
    Metric(
        name="learner/trained_contexts",
        reduction="count over the batch",
        unit="contexts",
        explanation="contexts with at least one trained token; metrics.jsonl has the trained tokens of each context "
        "index in `tokens_by_context`",
        healthy="above the number of trajectories: every context is trained, not only the last",
    ),
    Metric(
        name="learner/trained_trajectories",
        reduction="count over the batch",
        unit="trajectories",
        explanation="trajectories with at least one trained token",
    ),
    Metric(
        name="learner/step_s",
        chart="Seconds of a step: wait, train, publish",
        reduction="sum over the step",
        unit="s",
        explanation="one training step: preparation, forward, backward, update",
        healthy="steady",
    ),
    Metric(
        name="learner/plan_s",
        reduction="sum over the step",
        unit="s",
        explanation="minibatches, token weights and packs",
        healthy="under 2 % of the step",
    ),
    Metric(
        name="learner/proximal_s",
        reduction="sum over the step",
        unit="s",
        explanation="the forward pass for π_prox and the values",
        healthy="about a quarter of the step",
        absent_if="no such pass is needed: one minibatch, corrections of token or context scope, no `gae`, no KL in "
        "the reward",
    ),
    Metric(
        name="learner/reference_s",
        reduction="sum over the step",
        unit="s",
        explanation="the forward pass of the reference policy",
        healthy="about a quarter of the step",
        absent_if="there is no reference policy",
    ),
    Metric(
        name="learner/advantage_s",
        reduction="sum over the step",
        unit="s",
        explanation="advantages, and corrections if they are computed before the forward pass",
        healthy="under 2 % of the step",
    ),
    Metric(
        name="learner/forward_s",
        reduction="sum over micro-batches",
        unit="s",
        explanation="forward pass and loss of training",
        absent_if="no token was computed",
    ),
    Metric(
        name="learner/backward_s",
        reduction="sum over micro-batches",
        unit="s",
        explanation="backward pass",
        healthy="about twice `learner/forward_s`",
        absent_if="no token was computed",
    ),
    Metric(
        name="learner/update_s",
        reduction="sum over minibatches",
        unit="s",
        explanation="gradient clipping and optimizer",
        absent_if="no token was trained",
    ),
    Metric(
        name="learner/tokens_per_s",
        chart="Tokens per second",
        reduction="sum over the step, divided by `learner/step_s`",
        unit="tokens/s",
        explanation="tokens of the computed contexts; a shared prefix counts once per context",
        healthy="steady",
    ),
    Metric(
        name="learner/unique_fraction",
        reduction="ratio of sums over the step",
        unit="0–1",
        explanation="tokens that the model computed (a shared prefix once), divided by the tokens of the computed "
        "contexts",
        healthy="below 1 if contexts share their beginnings: system prompt, question, memory",
    ),
    Metric(
        name="learner/padding_fraction",
        reduction="ratio of sums over the step",
        unit="0–1",
        explanation="computed tokens that belong to no context, divided by all computed tokens. Packs have no padding; "
        "a rank without work computes one such token. Not counted: up to 127 padded positions per micro-batch on a GPU",
        healthy="0",
    ),
    Metric(
        name="learner/mfu",
        reduction="ratio of sums over the step",
        unit="0–1",
        explanation="model FLOPs utilisation: floating-point operations of the step divided by the devices' dense bf16 "
        "peak in that time; a lower bound, because the quadratic part of attention is not counted",
        healthy="0.3–0.5 on GPUs",
        absent_if="the device's peak is not known, as on a CPU",
    ),
)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of step `step`. `values`: metric tag → value.

    tokens_by_age       age (step - version) → number of trained tokens
    tokens_by_context   context index → number of trained tokens; the last index includes all later ones
    """

    step: int
    values: dict[str, float]
    tokens_by_age: dict[int, int]
    tokens_by_context: dict[int, int]


class Clock:
    """Measures the seconds of each phase of a step on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Adds the time since the previous lap to `phase`, after waiting for the device to finish its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        return self._last - self._start


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a step, summed over all ranks.

    num_computed_tokens  tokens of the training forward pass
    num_padding_tokens   those of them that belong to no context; a rank without work computes one
    flops                floating-point operations of the step
    peak_flops           peak of all devices together, in floating-point operations per second; None if not known
    """

    num_computed_tokens: int
    num_padding_tokens: int
    flops: float
    peak_flops: float | None


def summarise(
    batch: Batch,
    plan: StepPlan,
    diagnostics: Diagnostics,
    work: Work,
    *,
    norms: Sequence[float],
    advantage_mean: float,
    step: int,
    rate: float,
    num_skipped: int,
    clock: Clock,
) -> StepMetrics:
    """Computes the metrics of a step.

    diagnostics   already reduced over all ranks
    norms         gradient norm of each minibatch
    rate          learning rate
    num_skipped   skipped updates of the step
    """
    trained, sampled, computed = plan.trained, batch.sampled, plan.selection.computed
    lengths = np.zeros(batch.num_contexts, dtype=np.int64)
    np.maximum.at(lengths, sampled.context[computed], sampled.position[computed])
    num_input_tokens = int(lengths.sum())
    num_trained = int(np.count_nonzero(trained))
    age = step - sampled.version[trained]
    context_index = batch.context_index[sampled.context[trained]].clip(max=NUM_BUCKETS - 1)
    values = {
        "staleness/mean": float(age.mean()) if len(age) else 0.0,
        "staleness/max": int(age.max(initial=0)),
        "staleness/over_age_tokens": plan.num_over_age,
        **diagnostics.values(),
        "learner/advantage_mean": advantage_mean,
        "learner/grad_norm": float(np.mean(norms)) if norms else 0.0,
        "learner/learning_rate": rate,
        "learner/skipped_updates": num_skipped,
        "learner/trained_tokens": num_trained,
        "learner/skipped_tokens": 1 - np.count_nonzero(computed) / num_trained if num_trained else 0.0,
        "learner/trained_contexts": len(np.unique(sampled.context[trained])),
        "learner/trained_trajectories": len(np.unique(sampled.trajectory[trained])),
        "learner/step_s": clock.total_s,
        **{f"learner/{phase}_s": seconds for phase, seconds in clock.seconds.items()},
        "learner/tokens_per_s": num_input_tokens / clock.total_s,
        "learner/unique_fraction": work.num_computed_tokens / num_input_tokens if num_input_tokens else 1.0,
        "learner/padding_fraction": work.num_padding_tokens / max(1, work.num_computed_tokens),
    }
    if work.peak_flops:
        values["learner/mfu"] = work.flops / clock.total_s / work.peak_flops
    return StepMetrics(
        step=step,
        values=values,
        tokens_by_age={a: count for a, count in enumerate(np.bincount(age).tolist()) if count},
        tokens_by_context={k: count for k, count in enumerate(np.bincount(context_index).tolist()) if count},
    )
