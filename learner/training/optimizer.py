"""AdamW, its learning-rate schedule, and an update that skips non-finite gradients."""

from __future__ import annotations

import math

import torch
from torch import nn

from learner.model.parallel import clip_gradients
from protocol.errors import DivergenceError
from protocol.learner_config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all trained parameters; weight decay only on matrices, not on norms and biases.

    The parameters of a value head (`model.value_head`) are in groups of their own, with the key `is_value_head` set:
    `apply_update` gives them another learning rate.
    """
    head = getattr(model, "value_head", None)
    value_head = {id(parameter) for parameter in (head.parameters() if isinstance(head, nn.Module) else ())}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if (p.ndim >= 2) == decays and (id(p) in value_head) == is_value_head],
            "weight_decay": config.weight_decay if decays else 0.0,
            "is_value_head": is_value_head,
        }
        for is_value_head in (False, True)
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"] or not group["is_value_head"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def learning_rate(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """`learning_rate` of the config times the schedule's factor for the update from version `step` to `step + 1`."""
    return config.learning_rate * schedule_factor(step, num_steps=num_steps, config=config)


def value_learning_rate(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of the value head, with the same schedule; that of the policy unless the config sets it."""
    peak = config.learning_rate if config.value_learning_rate is None else config.value_learning_rate
    return peak * schedule_factor(step, num_steps=num_steps, config=config)


def schedule_factor(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """The factor in [0, 1] on the full learning rates. A pure function: the schedule has no state.

    Linear warm-up that reaches the full rate at its last step; then constant, or linear or cosine decay (Loshchilov &
    Hutter 2017, eq. 5, one period) to `final_fraction` of the full rate at `num_steps`, and constant after that.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    match config.schedule:
        case "constant":
            decayed = 0.0
        case "linear":
            decayed = progress
        case "cosine":
            decayed = 0.5 * (1.0 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - config.final_fraction) * decayed


def apply_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rate: float,
    value_rate: float | None = None,
    clip_norm: float,
    loss_is_finite: bool = True,
) -> float:
    """Clips the accumulated gradient to `clip_norm`, updates with learning rate `rate`, and clears the gradient.

    `value_rate`: the learning rate of the value head; None: `rate`.

    Returns the norm before clipping. If it is not finite, only the gradient is cleared: the caller counts the skip.
    With `loss_is_finite` false it is NaN. All ranks must call it, with the same `loss_is_finite`, and get the same
    norm.
    """
    norm = clip_gradients(model.parameters(), clip_norm) if loss_is_finite else math.nan
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate if value_rate is None or not group.get("is_value_head") else value_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class SkipGuard:
    """Counts skipped updates, in total and in a row. Checkpoints contain both counts."""

    def __init__(self, *, max_consecutive: int, num_skipped: int = 0, num_consecutive: int = 0) -> None:
        self.max_consecutive = max_consecutive
        self.num_skipped = num_skipped
        self.num_consecutive = num_consecutive

    def record(self, norm: float) -> None:
        """Records a norm from `apply_update`. Raises: DivergenceError if `max_consecutive` in a row were non-finite."""
        if math.isfinite(norm):
            self.num_consecutive = 0
            return
        self.num_skipped += 1
        self.num_consecutive += 1
        if self.num_consecutive >= self.max_consecutive:
            raise DivergenceError(
                f"the last {self.num_consecutive} updates had a loss or gradient that is not finite, and "
                f"learner.optimizer.max_consecutive_skips is {self.max_consecutive}: lower learner.optimizer."
                "learning_rate, and inspect the batch that was saved"
            )
