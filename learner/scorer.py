"""The model as the learner sees it: packed contexts in, log-probs, entropies and values of chosen tokens out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.attention import PackedInputs


class Scores(NamedTuple):
    """Of M scored tokens: logprob, entropy and value (None without a value head), [M], fp32 (fp64 of an fp64 model).

    A tuple, as FSDP finds the tensors to hook its backward on only in what PyTorch can flatten.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor | None


class Scorer(nn.Module):
    """A causal language model, with a value head if asked for, whose one forward uses every parameter.

    Shard its decoder layers and then this module as the root; the output embedding must not be sharded by itself: its
    weight is read here, not called.

    model        the language model; its attention implementation is replaced by that of packs
    value_head   nn.Linear(hidden size, 1) | None

    Raises: DataError for a model whose logits are more than its output embedding of its last hidden states.
    """

    def __init__(self, model: PreTrainedModel, *, with_value_head: bool = False) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(
        self,
        packed: PackedInputs,
        source: Tensor,
        target: Tensor,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> Scores:
        """Scores the token ids `target` as next tokens after the packed indices `source`, int64 [M >= 0] both."""
        raise NotImplementedError
