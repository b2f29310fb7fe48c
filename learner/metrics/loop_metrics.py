"""The metrics that the training loop and the metrics writer measure, and the trajectories that are written as text."""

from __future__ import annotations

from protocol.metric import Metric

TEXT_EVERY_STEPS = 10
"""Trajectories are written as text at every step that is a multiple of this."""

_SECONDS = "Seconds of a step: wait, train, publish"

LOOP_METRICS = (
    Metric(
        name="staleness/bound",
        chart="Age of trained tokens in steps",
        reduction="value of the step",
        unit="steps",
        explanation="`learner.staleness_bound`",
        healthy="constant",
    ),
    Metric(
        name="learner/wait_s",
        chart=_SECONDS,
        reduction="sum over the step",
        unit="s",
        explanation="time that the loop waited for the batch",
        healthy="below `learner/step_s` with enough engines; above it, generation is the bottleneck",
    ),
    Metric(
        name="learner/publish_s",
        chart=_SECONDS,
        reduction="sum over the step",
        unit="s",
        explanation="time that the loop took to publish the version that the step started from; engines fetch it later",
        healthy="a small part of the step",
    ),
    Metric(
        name="learner/checkpoint_failures",
        reduction="count since the learner's start",
        unit="attempts",
        explanation="attempts to write a checkpoint that failed, until the step is recorded; the next step tries again",
        healthy="0; if it increases, the disk is full or cannot be written, and a restart repeats more and more steps",
    ),
    Metric(
        name="learner/resident_mb",
        reduction="value when the step is recorded",
        unit="MB",
        explanation="resident memory of the learner's process (rank 0)",
        healthy="steady after the first hundred steps",
    ),
    *(
        Metric(
            name=f"trajectories/{which}",
            reduction="one trajectory of the batch",
            unit="text",
            explanation=f"the trajectory with the {extreme} reward of those that did not fail: every context, with the "
            "tokens that were given and those that each version sampled",
            healthy="read them: they show first whether the reward increases for the wrong reason",
            absent_if=f"the step is not a multiple of {TEXT_EVERY_STEPS}, or every trajectory failed",
            kind="text",
        )
        for which, extreme in (("best", "highest"), ("worst", "lowest"))
    ),
    Metric(
        name="trajectories/failures",
        reduction="count since the learner's start",
        unit="text",
        explanation="FAILED trajectories by reason; reasons that differ only in numbers, names or addresses are one",
        absent_if="no trajectory failed",
        kind="text",
    ),
    Metric(
        name="trajectories/first_samples",
        reduction="the first `learner.first_samples` trajectories",
        unit="text",
        explanation="endings, rewards, format and tokens of the first trajectories, with warnings; also in "
        "first_samples.txt",
        healthy="no warning: otherwise end the run and mend what it names",
        absent_if="written once in a run",
        kind="text",
    ),
)
