"""Low-rank adapters (Hu et al. 2021): the only thing that trains is W + (alpha / rank) B A of some linear layers.

peft puts them into the model in place: it stays the Hugging Face model that it was, with a few layers replaced.
Engines know nothing of it; they get W with the product added, under W's own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.model.parallel import decoder_layers
from protocol.config import LoraConfig
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_ADAPTER = "default"
_BASE = ".base_layer"


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes `model` and gives its layers named `config.targets` adapters that begin at zero.

    Their A is drawn from torch's generator, which must be seeded alike on all ranks. Call it before `shard`.
    Raises: ConfigError where peft is not installed or a target is not a linear layer of the decoder's layers; the
    output embedding is none, because the scorer reads its weight without calling it.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("learner.lora needs peft: pip install 'palimpsest[lora]'") from error
    linear = {
        name.rpartition(".")[2]
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    for target in config.targets:
        if target not in linear:
            raise ConfigError(f"learner.lora.targets must be of {', '.join(sorted(linear))}, got {target!r}")
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
    """Whole weights under the base model's names: W + scaling B A, formed in W's dtype; `weights` stay as they are.

    weights  of a model with adapters, by its own names
    scaling  by layer, as `scalings` gives them
    """
    merged = {name.replace(_BASE, ""): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for layer, scale in scaling.items():
        down, up = (weights[f"{layer}.lora_{letter}.{_ADAPTER}.weight"] for letter in "AB")
        name = f"{layer}.weight"
        merged[name] = merged[name] + scale * (up @ down).to(merged[name].dtype)
    return merged
