"""Loads a policy: a causal language model from a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from protocol.errors import DataError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files copied next to the weights, so that a checkpoint can be served."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Policy:
    """A model ready for training, and its tokenizer files.

    Dropout is always off: the proximal policy is the model itself, so two forward passes of one input must be equal.
    """

    model: PreTrainedModel
    tokenizer_files: tuple[Path, ...]

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_policy(folder: Path, *, device: str = "cpu") -> Policy:
    """Loads config, safetensors (as float32) and tokenizer files of `folder`, without network access or remote code.

    Raises: DataError if a file is missing or does not match the config, or if the model's logits are not exactly the
    output embedding of its last hidden states (capped or scaled logits): the scorer relies on this.
    """
    _require(folder, ("config.json",), "config")
    _require(folder, _WEIGHTS, "weights")
    _require(folder, _VOCABULARIES, "tokenizer")
    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"model folder {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    model, report = cast("tuple[PreTrainedModel, dict[str, set]]", loaded)
    if lacking := sorted(report["missing_keys"]) + sorted(key[0] for key in report["mismatched_keys"]):
        raise DataError(
            f"model folder {folder}: {len(lacking)} weights of its config are missing or of another shape, "
            f"the first is {lacking[0]}; give a folder whose weights belong to its config"
        )
    nn.Module.to(model, torch.device(device)).eval()
    _check_head(model, folder)
    files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return Policy(model=model, tokenizer_files=files)


@torch.no_grad()
def _check_head(model: PreTrainedModel, folder: Path) -> None:
    probe = torch.tensor([[0, 0]], device=model.device)
    wanted = model(input_ids=probe, use_cache=False).logits
    head = cast(nn.Module, model.get_output_embeddings())
    found = head(model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state)
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3):
        raise DataError(
            f"model folder {folder}: {type(model).__name__} changes its logits after the output embedding, "
            "which the learner does not support; use a model like Qwen2, Qwen3 or Llama"
        )


def _require(folder: Path, names: tuple[str, ...], what: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise DataError(f"model folder {folder} has no {what}: it must contain {' or '.join(names)}")
