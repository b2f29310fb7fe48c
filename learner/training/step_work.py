"""Counts the tokens that a training step computes and its floating-point operations, over all ranks."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from learner.batch.microbatches import StepPlan
from learner.metrics.step_metrics import Work
from learner.model.flops import peak_flops, training_flops
from learner.model.parallel import World


def step_work(plan: StepPlan, model: PreTrainedModel, *, num_forwards: int, world: World) -> Work:
    """The work of a step on all ranks; every rank must call it with its own plan.

    num_forwards: forward passes before training. They may cover more contexts than training, which is not counted.
    """
    device = model.device
    own = [each for minibatch in plan.minibatches for each in minibatch]
    counts = [
        sum(each.pack.num_unique_tokens for each in own),
        sum(each.num_contexts == 0 for each in own),
        sum(len(each.placement.source) for each in own),
    ]
    num_tokens, num_padding, num_scored = world.sum(torch.tensor(counts, device=device)).tolist()
    peak = peak_flops(device)
    return Work(
        num_computed_tokens=num_tokens,
        num_padding_tokens=num_padding,
        flops=training_flops(model, num_tokens=num_tokens, num_scored=num_scored, num_forwards=num_forwards),
        peak_flops=peak and peak * world.size,
    )
