"""Attention over a packed forest, as an attention implementation of transformers: exact, without a mask on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.packing import Pack

NAME = "palimpsest"

Implementation = Literal["blocks", "flex"]


class Plan(Protocol):
    """How one pack attends; shared by all layers."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[1, U, H, D] from query [1, H, U, D] and key, value [1, K, U, D], H a multiple of K."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PackedInputs:
    """A pack on a device.

    token_ids, position_ids  int64 [1, U]
    plan                     what `packing_plan=` of the decoder's forward takes
    """

    token_ids: Tensor
    position_ids: Tensor
    plan: Plan


def choose(device: torch.device) -> Implementation:
    """`flex` (FlexAttention) on CUDA, `blocks` elsewhere; logged once for each device type."""
    raise NotImplementedError


def to_device(pack: Pack, device: torch.device, *, implementation: Implementation | None = None) -> PackedInputs:
    """Plans the attention of a pack and brings it to `device`; `implementation` is that of `choose` if not given."""
    raise NotImplementedError


def install(model: PreTrainedModel) -> None:
    """Makes `model` attend by the plan it is given as `packing_plan=`; without one it attends causally, maskless."""
    raise NotImplementedError
