"""The learner's forward pass: log-probs, entropies and values of chosen tokens of packed contexts."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.model.attention import PackedInputs, install
from learner.model.tiled_logprobs import token_scores


class Scores(NamedTuple):
    """logprob, entropy and value (None without a value head) of M scored tokens: [M], fp32, or fp64 of an fp64 model.

    A tuple, because FSDP registers backward hooks only on tensors in structures that PyTorch can flatten.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor | None


class Scorer(nn.Module):
    """A causal language model with an optional value head. One forward uses every parameter.

    To shard it, shard its decoder layers and then this module as the root. The output embedding must not be sharded
    separately: its weight is read here and the module is not called.

    model       its attention implementation is replaced by the one for packs; its logits must be the output
                embedding of its last hidden states, neither scaled nor capped
    value_head  nn.Linear(hidden size, 1), initialised to 0, or None
    """

    def __init__(self, model: PreTrainedModel, *, with_value_head: bool = False) -> None:
        super().__init__()
        install(model)
        self.model = model
        self.value_head = _value_head(model) if with_value_head else None

    def forward(
        self,
        packed: PackedInputs,
        source: Tensor,
        target: Tensor | None,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> Scores:
        """Scores the token ids `target` as next tokens of the packed indices `source`, int64 [M >= 0] each.

        Without `target` it scores the most likely next tokens; this forms all [M, V] logits at once, so M must be
        small. The value of a token is computed from the hidden state that predicts the token.
        """
        decoder = cast(nn.Module, self.model.get_decoder())
        head = cast(nn.Linear, self.model.get_output_embeddings())
        hidden = decoder(
            input_ids=packed.token_ids, position_ids=packed.position_ids, use_cache=False, attention_plan=packed.plan
        ).last_hidden_state[0].index_select(0, source)  # fmt: skip
        if target is None:
            target = nn.functional.linear(hidden, head.weight, head.bias).argmax(-1)
        logprob, entropy = token_scores(
            hidden, head.weight, target, bias=head.bias, temperature=temperature, entropy_grad=entropy_grad
        )
        return Scores(logprob, entropy, self._values(hidden, logprob.dtype))

    def _values(self, hidden: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[M] in `dtype`, fp32 at least: in bf16, values near 1 would have steps of 1/128."""
        if self.value_head is None:
            return None
        weight, bias = (each.to(dtype) for each in (self.value_head.weight, self.value_head.bias))
        return torch.mv(hidden.to(dtype), weight[0]) + bias  # not a view: FSDP registers backward hooks on outputs


def _value_head(model: PreTrainedModel) -> nn.Linear:
    embedding = cast(nn.Linear, model.get_output_embeddings()).weight
    head = nn.Linear(embedding.shape[1], 1, device=embedding.device, dtype=embedding.dtype)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head
