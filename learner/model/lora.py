"""Low-rank adapters (Hu et al. 2021): only A and B of W + (alpha / rank) B A are trained, in some linear layers.

peft replaces these layers in the Hugging Face model, in place. Engines get the merged weight under W's name and need no
support for adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.model.parallel import decoder_layers
from protocol.errors import ConfigError
from protocol.learner_config import LoraConfig

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_ADAPTER = "default"
_BASE = ".base_layer"


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes `model` and adds adapters to its layers named `config.targets`; their product B A is zero at first.

    A is drawn from torch's global generator, which must have the same seed on all ranks. Call it before `shard`.
    Raises: ConfigError if peft is not installed or a target is not a linear layer of the decoder's layers. The output
    embedding is refused because the scorer reads its weight without calling the module.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("learner.lora needs peft: pip install 'palimpsest-rl[lora]'") from error
    linear = {
        name.rpartition(".")[2]
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    for target in config.targets:
        if target not in linear:
            raise ConfigError(f"learner.lora.targets must be one of {', '.join(sorted(linear))}, got {target!r}")
    chosen = peft.LoraConfig(r=config.rank, lora_alpha=cast(int, config.alpha), target_modules=list(config.targets))
    peft.inject_adapter_in_model(chosen, model, adapter_name=_ADAPTER)


def scalings(model: PreTrainedModel) -> dict[str, float]:
    """alpha / rank by the name of each layer that has an adapter."""
    return {
        name: cast("LoraLayer", module).scaling[_ADAPTER]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def merge(weights: Mapping[str, Tensor], scaling: Mapping[str, float]) -> dict[str, Tensor]:
    """Merged weights W + scaling B A under the base model's names, in W's dtype; `weights` are not changed.

    weights  unsharded, of a model with adapters, under its names
    scaling  by layer name, from `scalings`
    """
    merged = {name.replace(_BASE, ""): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for layer, scale in scaling.items():
        down, up = (weights[f"{layer}.lora_{letter}.{_ADAPTER}.weight"] for letter in "AB")
        name = f"{layer}.weight"
        merged[name] = merged[name] + scale * (up @ down).to(merged[name].dtype)
    return merged
