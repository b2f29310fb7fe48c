"""Attention over a packed forest, registered as an attention implementation of transformers; exact, no dense mask.

Scorer ── attention_plan=plan ──► decoder ──► each layer's attention ──► plan.attend(query, key, value)
                                                                        blocks (CPU): learner/model/attention_cpu.py
                                                                        flex (CUDA):  learner/model/attention_flex.py
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from learner.batch.packing import Pack
from protocol.errors import DataError

NAME = "palimpsest"
"""Name of the attention implementation in transformers."""

Implementation = Literal["blocks", "flex"]

_logger = logging.getLogger(__name__)


class AttentionPlan(Protocol):
    """The attention of one pack; it is planned once and used by all layers."""

    @property
    def num_depths(self) -> int:
        """Number of tokens of the longest context."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[1, U, H, D] from query [1, H, U, D] and key, value [1, K, U, D], H a multiple of K."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PackedInputs:
    """A pack of U tokens on a device. U may include padding tokens, which attend only to themselves.

    token_ids, position_ids  int64 [1, U]
    plan                     the argument `attention_plan=` of the decoder's forward
    """

    token_ids: Tensor
    position_ids: Tensor
    plan: AttentionPlan


@functools.cache
def default_implementation(device_type: str) -> Implementation:
    """`flex` (FlexAttention) on CUDA, `blocks` on a CPU; logged once. Raises: DataError for another device type."""
    if device_type not in ("cpu", "cuda"):
        raise DataError(f"packed attention runs on a device of type cpu or cuda, got {device_type}")
    chosen: Implementation = "flex" if device_type == "cuda" else "blocks"
    _logger.info("attention over packs on %s: %s", device_type, chosen)
    return chosen


def to_device(pack: Pack, device: torch.device | str, *, implementation: Implementation | None = None) -> PackedInputs:
    """Plans a pack's attention and moves it to `device`; `implementation` defaults to that of the device."""
    device = torch.device(device)
    if (implementation or default_implementation(device.type)) == "flex":
        from learner.model.attention_flex import flex_inputs  # imports torch's compiler

        token_ids, position_ids, plan = flex_inputs(pack, device)
    else:
        from learner.model.attention_cpu import BlockPlan

        token_ids, position_ids = torch.from_numpy(pack.token_ids), torch.from_numpy(pack.depth)
        plan = BlockPlan.of(pack)
    return PackedInputs(token_ids.to(device)[None], position_ids.to(device)[None], plan)


def install(model: PreTrainedModel) -> None:
    """Makes `model` attend by the plan that its decoder's forward gets as `attention_plan=`.

    Without a plan, attention is causal without a mask: rows may be padded on the right, never on the left.
    """
    AttentionInterface.register(NAME, _attention_forward)
    model.set_attn_implementation(NAME)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    attention_plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers calls this in each layer: query [B, H, U, D], key and value [B, K, U, D] -> [B, U, H, D]."""
    if attention_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    if sliding_window is not None and sliding_window < attention_plan.num_depths:
        raise DataError(
            f"packed attention has no sliding window: contexts must be <= {sliding_window} tokens, "
            f"got {attention_plan.num_depths}"
        )
    if dropout:
        raise DataError(f"packed attention has no dropout: attention_dropout must be 0, got {dropout}")
    return attention_plan.attend(query, key, value, scale=scaling or query.shape[-1] ** -0.5), None
