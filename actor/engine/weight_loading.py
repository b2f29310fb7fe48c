"""Loads the weights of a Hugging Face folder into a model. All checks run before the first parameter changes."""

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
    """Returns the safetensors files of a folder: the files in its index, or `model.safetensors` if there is no index.

    Raises: WeightsError if there are none, or the index cannot be read.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise WeightsError(f"{index} is not an index of safetensors files: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise WeightsError(f"{index}: weight_map must name files in {folder}, got {name!r:.200}")
        return [folder / name for name in sorted(names)]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise WeightsError(f"model_path {str(folder)!r} has neither {_SINGLE} nor {_INDEX}")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a folder, by name. Raises: WeightsError if a file is missing or damaged."""
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is not a readable safetensors file: {error}") from error
    return weights


def match_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns pairs (parameter, new value), one for each tensor of the model. Tied names count as one tensor.

    Raises: WeightsError naming the first tensor that is missing or unknown, has another shape or a value that is not
    finite, or is tied in the model and given twice with different values.
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
    """Copies each value into its parameter, in the parameter's dtype. Cannot fail: `match_weights` checked all."""
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
