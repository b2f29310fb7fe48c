"""The weights as engines and other programs take them: whole, on the CPU, under the base model's names."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from learner.lora import merge, scalings
from learner.parallel import World, full


@torch.no_grad()
def published_weights(model: PreTrainedModel, *, world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in `dtype`, tied ones once, adapters merged, under the names that `save_pretrained` gives.

    All ranks call it; rank 0 gets the weights, the others nothing. On the CPU they may be the parameters themselves:
    write or copy them before the next update.
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


def save_folder(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Writes config and `weights` of `model` into an existing folder, as `save_pretrained` does, whose config it is.

    The config names the dtype of `weights`, which is what an engine will load them as.
    """
    config = copy.deepcopy(model.config)
    config.dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
