"""Weights of a Hugging Face folder, checked in full before the first byte of the model changes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from protocol.errors import WeightsError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, else the single one.

    Raises: WeightsError where there are none, or the index cannot be read.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise WeightsError(f"{index} is not an index of safetensors files: {error!r}") from error
        return [folder / name for name in sorted(names)]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise WeightsError(f"model_path {str(folder)!r} has neither {_SINGLE} nor {_INDEX}")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its name. Raises: WeightsError where a file is missing or damaged."""
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is not a readable safetensors file: {error}") from error
    return weights


def match_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (parameter, new value), one for each of the model's tensors; tied names count as one tensor.

    Raises: WeightsError naming the first tensor that is missing, unknown, of another shape, not finite, or given
    twice with different values where the model ties it.
    """
    state = model.state_dict(keep_vars=True)
    if unknown := sorted(weights.keys() - state.keys()):
        raise WeightsError(f"tensor {unknown[0]!r} is not in the served model ({len(unknown)} unknown tensors)")
    tied: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        tied[id(tensor)].append(name)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for names in tied.values():
        given = [name for name in names if name in weights]
        if not given:
            raise WeightsError(f"tensor {names[0]!r} of the served model is missing")
        target, value = state[names[0]], weights[given[0]]
        if value.shape != target.shape:
            raise WeightsError(f"tensor {given[0]!r} must have shape {list(target.shape)}, got {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"tensor {given[0]!r} has values that are not finite")
        for other in given[1:]:
            if not torch.equal(weights[other], value):
                raise WeightsError(f"tensors {given[0]!r} and {other!r} are tied in the served model and differ")
        pairs.append((target, value))
    return pairs


def apply_weights(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each value into its parameter, in the parameter's dtype. Cannot fail half-way: all was checked before."""
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
