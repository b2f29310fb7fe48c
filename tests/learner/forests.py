"""Random sets of contexts with shared prefixes, and the log-probs of a plain forward of each context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

VOCAB_SIZE = 40
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
}

Ids = NDArray[np.int64]


def model_of(
    family: str = "qwen2", *, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE
) -> PreTrainedModel:
    """A random model of 2 layers, hidden 32, grouped heads."""
    torch.manual_seed(0)
    make_config, make_model, extra = FAMILIES[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"vocab_size": vocab_size, "initializer_range": 0.2, "tie_word_embeddings": True}
    model = make_model(make_config(**(sizes | heads | shape | extra)))
    nn.Module.to(model, dtype)
    return model


@pytest.fixture
def norm_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes RMSNorm in the dtype of its input; transformers always computes it in fp32."""

    def forward(self: Qwen2RMSNorm, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (Qwen2RMSNorm, Qwen3RMSNorm, LlamaRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model uses the sdpa attention of transformers."""
    before = str(model.config._attn_implementation)
    model.set_attn_implementation("sdpa")
    yield
    model.set_attn_implementation(before)


def plain_logprobs(model: PreTrainedModel, context: Ids, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns (logprob [L - 1], entropy [L - 1]) of all but the first token of a context, in a separate forward."""
    ids = torch.from_numpy(context)
    logits = model(input_ids=ids[None, :-1]).logits[0] / temperature
    all_logprobs = logits.log_softmax(dim=-1)
    return all_logprobs.gather(1, ids[1:, None]).squeeze(1), -(all_logprobs.exp() * all_logprobs).sum(dim=-1)


def every_token(contexts: Sequence[Ids]) -> tuple[Ids, Ids, Ids]:
    """Returns (context, position, token id) of all tokens but the first of each context."""
    owner = np.concatenate([np.full(len(each) - 1, number) for number, each in enumerate(contexts)])
    position = np.concatenate([np.arange(1, len(each)) for each in contexts])
    return owner, position, np.concatenate([each[1:] for each in contexts])


def grown(
    rng: np.random.Generator, *, num_contexts: int, stretches: Sequence[int], vocab_size: int = VOCAB_SIZE
) -> list[Ids]:
    """Contexts: each is a random prefix of an earlier one plus random ids, whose number is from `stretches`."""
    contexts = [rng.integers(0, vocab_size, size=max(stretches))]
    while len(contexts) < num_contexts:
        parent = contexts[int(rng.integers(len(contexts)))]
        shared = parent[: int(rng.integers(1, len(parent) + 1))]
        contexts.append(np.concatenate([shared, rng.integers(0, vocab_size, size=int(rng.choice(stretches)))]))
    return [contexts[i] for i in rng.permutation(num_contexts)]


def forests(*, vocab_size: int = 3, max_length: int = 14) -> st.SearchStrategy[list[Ids]]:
    """Small contexts of few token ids, so that prefixes, duplicates and single-token nodes are frequent."""
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=max_length)
    return st.lists(ids.map(lambda each: np.array(each, dtype=np.int64)), min_size=1, max_size=10)
