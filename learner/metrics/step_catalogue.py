"""Declarations of the metrics that the trainer measures in one training step; step_metrics.py computes them."""

from __future__ import annotations

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
        chart="Groups without a signal",
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
