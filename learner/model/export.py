"""Exports weights for engines and Hugging Face folders: unsharded, on the CPU, under the base model's names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from learner.batch.packing import pack
from learner.model.attention import to_device
from learner.model.lora import merge, scalings
from learner.model.parallel import World, full
from learner.model.scorer import Scorer
from protocol.weight_messages import CanaryFields

_CANARY_PROMPTS = 4
_CANARY_TOKENS = 8
# Any number coprime to common vocabulary sizes; the prompts are arbitrary token ids, not text.
_CANARY_STRIDE = 7919


@torch.no_grad()
def published_weights(model: PreTrainedModel, *, world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in `dtype`, tied ones once, adapters merged, under the names that `save_pretrained` uses.

    All ranks must call it; rank 0 gets the weights, the others an empty dict. On a CPU the tensors may share memory
    with the parameters: write or copy them before the next update.
    """
    tied = set(model.all_tied_weights_keys or ())
    scaling = scalings(model)
    gathered: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = full(tensor if scaling else _cast(tensor, dtype))
        if world.rank == 0 and name not in tied:
            gathered[name] = whole.detach().cpu()
    merged = merge(gathered, scaling) if gathered else {}
    return {name: _cast(tensor, dtype).contiguous() for name, tensor in merged.items()}


@torch.no_grad()
def canary(scorer: Scorer, *, device: torch.device) -> CanaryFields:
    """Prompts without a common prefix, and the log-prob of the most likely next token of each, to verify engines.

    An engine with the published weights must reproduce the log-probs. All ranks must call it. It runs one forward
    pass of a few tokens in the learner's compute dtype.
    """
    num_tokens = cast(nn.Linear, scorer.model.get_output_embeddings()).weight.shape[0]
    places = np.arange(_CANARY_PROMPTS)[:, None]
    prompts = (places * (num_tokens // _CANARY_PROMPTS) + _CANARY_STRIDE * np.arange(_CANARY_TOKENS)) % num_tokens
    row = pack(list(prompts))
    last = row.locate(places[:, 0], np.full(_CANARY_PROMPTS, _CANARY_TOKENS - 1))
    scores = scorer(to_device(row, device), torch.from_numpy(last).to(device), None)
    if isinstance(scorer, FSDPModule):
        scorer.reshard()  # without a backward pass, FSDP would leave the root unsharded and in bf16
    return CanaryFields(prompts=prompts.tolist(), logprobs=scores.logprob.tolist())


def save_folder(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Writes config and `weights` of `model` into an existing folder, in the format of `save_pretrained`.

    The config names the dtype of `weights`, in which an engine will load them.
    """
    config = copy.deepcopy(model.config)
    config.dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
