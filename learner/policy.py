"""The policy: a causal language model from a Hugging Face folder, and the log-probabilities of chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
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
"""What is copied beside the weights, so that a checkpoint can be served."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Policy:
    """A model ready for training, and the tokenizer files that belong to it. Dropout is off for good: the proximal
    policy is the model itself, and two forwards of one input must agree."""

    model: PreTrainedModel
    tokenizer_files: tuple[Path, ...]

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_policy(folder: Path, *, dtype: Literal["float32", "bfloat16"] = "float32", device: str = "cpu") -> Policy:
    """Loads config, safetensors and tokenizer files of `folder`; nothing is fetched, no code of the folder is run.

    Raises: DataError where a part is missing, does not fit the config, or the model's logits are more than its output
    embedding of its last hidden states (capped or scaled logits), which `token_logprobs` relies on.
    """
    _require(folder, ("config.json",), "config")
    _require(folder, _WEIGHTS, "weights")
    _require(folder, _VOCABULARIES, "tokenizer")
    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
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


def token_logprobs(
    model: PreTrainedModel, *, token_ids: Tensor, row: Tensor, position: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(logprobs float32 [N], entropy float32 [N]) of N tokens `target` at (row, position) of right-padded contexts.

    token_ids int64 [R, T]; row, position >= 1, target int64 [N]. Entropy carries no gradient. Padding is on the right
    and attention is causal, so no mask is needed: what is read lies left of all padding. Logits are formed only where
    they are used, divided by `temperature` in fp32 (fp64 for an fp64 model).
    """
    hidden = _decoder(model)(input_ids=token_ids, use_cache=False).last_hidden_state
    num_columns = token_ids.shape[1]
    hidden = hidden.flatten(0, 1).index_select(0, row * num_columns + position - 1)
    logits = _head(model)(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    all_logprobs = logits.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    return all_logprobs.gather(1, target[:, None]).squeeze(1), entropy


def _decoder(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder()


def _head(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, model.get_output_embeddings())


@torch.no_grad()
def _check_head(model: PreTrainedModel, folder: Path) -> None:
    probe = torch.tensor([[0, 0]], device=model.device)
    wanted = model(input_ids=probe, use_cache=False).logits
    found = _head(model)(_decoder(model)(input_ids=probe, use_cache=False).last_hidden_state)
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3):
        raise DataError(
            f"model folder {folder}: {type(model).__name__} changes its logits after the output embedding, "
            "which the learner does not support; use a model like Qwen2, Qwen3 or Llama"
        )


def _require(folder: Path, names: tuple[str, ...], what: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise DataError(f"model folder {folder} has no {what}: it must contain {' or '.join(names)}")
