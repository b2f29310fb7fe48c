"""What is known of a batch's sampled tokens before the step trains them, on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.algorithms.advantages import Advantages
from learner.batch.flatten import Batch
from learner.batch.microbatches import StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """[N] each, of N sampled tokens; what is not trained has advantage, return and importance 0.

    behavior, weight, advantage          float
    context, trajectory, age, turn       int64; turn is the number of the context in its trajectory
    proximal, importance, reference, old_values, returns
                                         float; None where the training forward tells them, or none is needed
    """

    behavior: Tensor
    weight: Tensor
    advantage: Tensor
    context: Tensor
    trajectory: Tensor
    age: Tensor
    turn: Tensor
    proximal: Tensor | None = None
    importance: Tensor | None = None
    reference: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    def select(self, index: Tensor) -> Columns:
        """The tokens that indices or a mask name."""
        columns = (getattr(self, each.name) for each in fields(self))
        return Columns(*(None if column is None else column[index] for column in columns))  # pyright: ignore[reportArgumentType]


def make_columns(batch: Batch, plan: StepPlan, earned: Advantages, *, step: int, device: torch.device) -> Columns:
    """`earned` is of the trained tokens of the plan."""
    sampled = batch.sampled

    def moved(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    def spread(values: NDArray[np.float32]) -> Tensor:
        whole = np.zeros(len(sampled), dtype=np.float32)
        whole[plan.trained] = values
        return moved(whole)

    return Columns(
        behavior=moved(sampled.behavior_logprob),
        weight=moved(plan.weight),
        advantage=spread(earned.advantage),
        context=moved(sampled.context),
        trajectory=moved(sampled.trajectory),
        age=moved(step - sampled.version.astype(np.int64)),
        turn=moved(batch.context_number[sampled.context]),
        returns=None if earned.returns is None else spread(earned.returns),
    )
