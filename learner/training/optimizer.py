"""AdamW, its learning rate by step, and the update that refuses what is not finite."""

from __future__ import annotations

import math

import torch
from torch import nn

from learner.model.parallel import clip_gradients
from protocol.config import OptimizerConfig
from protocol.errors import DivergenceError


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that train; weight decay on matrices only, not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def learning_rate(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of the update that leads from version `step` to `step + 1`; a pure function, so there is no state.

    Linear warm-up that reaches the full rate at its last step; then constant, or down along a line or half a cosine
    (Loshchilov & Hutter 2017, eq. 5, one period) to `final_fraction` of the full rate at `num_steps`, and no lower.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    match config.schedule:
        case "constant":
            decayed = 0.0
        case "linear":
            decayed = progress
        case "cosine":
            decayed = 0.5 * (1.0 - math.cos(math.pi * progress))
    return config.learning_rate * (1.0 - (1.0 - config.final_fraction) * decayed)


def apply_update(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, rate: float, clip_norm: float, loss_is_finite: bool = True
) -> float:
    """Clips the accumulated gradient to `clip_norm`, steps with `rate`, clears it; returns the norm before clipping.

    Where that norm is not finite nothing but the gradient changes, and the norm tells: the caller counts it. With a
    loss that is not finite, on any rank, it is NaN. All ranks call this, say the same of the loss and get one norm.
    """
    norm = clip_gradients(model.parameters(), clip_norm) if loss_is_finite else math.nan
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class SkipGuard:
    """Counts updates that were skipped; both counts belong into checkpoints."""

    def __init__(self, *, max_consecutive: int, num_skipped: int = 0, num_consecutive: int = 0) -> None:
        self.max_consecutive = max_consecutive
        self.num_skipped = num_skipped
        self.num_consecutive = num_consecutive

    def record(self, norm: float) -> None:
        """Takes the norm that `apply_update` gave. Raises: DivergenceError where `max_consecutive` in a row are bad."""
        if math.isfinite(norm):
            self.num_consecutive = 0
            return
        self.num_skipped += 1
        self.num_consecutive += 1
        if self.num_consecutive >= self.max_consecutive:
            raise DivergenceError(
                f"the last {self.num_consecutive} updates had a loss or gradient that is not finite, and "
                f"learner.optimizer.max_consecutive_skips is {self.max_consecutive}: lower learner.optimizer."
                "learning_rate, and look at the batch that was saved"
            )
