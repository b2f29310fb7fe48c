"""Computes the metrics of one training step that the trainer measures; step_catalogue.py declares them."""

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
