"""AdamW, its learning rate by step, and the update that refuses non-finite gradients."""

from __future__ import annotations

import math

import torch
from torch import nn

from protocol.config import OptimizerConfig


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

    Linear warm-up that reaches the full rate at its last step; then constant, or linear down to `final_fraction` of
    the full rate at `num_steps`, and no lower.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    return config.learning_rate * (1.0 - (1.0 - config.final_fraction) * progress)


def apply_update(model: nn.Module, optimizer: torch.optim.Optimizer, *, rate: float, clip_norm: float) -> float:
    """Clips the accumulated gradient to `clip_norm`, steps with `rate`, clears it; returns the norm before clipping.

    Where the norm is not finite nothing but the gradient changes, and the norm tells: the caller counts it.
    """
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
