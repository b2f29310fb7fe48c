"""Builds the token columns of a batch, on the device, from the batch, its plan and its advantages."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.algorithms.advantages import Advantages
from learner.algorithms.token_data import TokenData
from learner.batch.flatten import Batch
from learner.batch.microbatches import StepPlan


def step_tokens(batch: Batch, plan: StepPlan, advantages: Advantages, *, step: int, device: torch.device) -> TokenData:
    """All N sampled tokens of the batch. `advantages` has the trained ones; the others get advantage and return 0."""
    sampled = batch.sampled

    def moved(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    def spread(values: NDArray[np.float32]) -> Tensor:
        whole = np.zeros(len(sampled), dtype=np.float32)
        whole[plan.trained] = values
        return moved(whole)

    return TokenData(
        behavior=moved(sampled.behavior_logprob),
        weight=moved(plan.weight),
        advantages=spread(advantages.advantage),
        context=moved(sampled.context),
        trajectory=moved(sampled.trajectory),
        age=moved(step - sampled.version.astype(np.int64)),
        context_index=moved(batch.context_index[sampled.context]),
        returns=None if advantages.returns is None else spread(advantages.returns),
    )
