"""The learner's log-probs of tokens, and the weights and canary that it publishes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from learner.batch.packing import pack
from learner.model.attention import to_device
from learner.model.export import canary, published_weights
from learner.model.loading import load_policy
from learner.model.parallel import World
from learner.model.scorer import Scorer
from protocol.weight_messages import CanaryFields


def scorer_of(model: Path, *, scale: float) -> Scorer:
    """Loads the model and multiplies the weights of its last norm: another policy with a small delta."""
    policy = load_policy(model)
    with torch.no_grad():
        _last_norm(policy.model.state_dict()).mul_(scale)
    return Scorer(policy.model)


def weights_and_canary(model: Path, *, scale: float = 1.0) -> tuple[bytes, CanaryFields]:
    """Returns the safetensors file and the canary, made as the learner makes them."""
    scorer = scorer_of(model, scale=scale)
    weights = published_weights(scorer.model, world=World(), dtype=torch.float32)
    return save(weights), canary(scorer, device=torch.device("cpu"))


def save_scaled(model: Path, folder: Path, *, scale: float) -> Path:
    """Copies the model folder, with the scaled weights, to `folder`."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").write_bytes(weights_and_canary(model, scale=scale)[0])
    return folder


@torch.no_grad()
def logprobs(
    scorer: Scorer, prompt: Sequence[int], token_ids: NDArray[np.int32], *, temperature: float
) -> NDArray[np.float32]:
    """Computes log-probs of `token_ids` after `prompt` with the learner's forward pass: float32 [len(token_ids)]."""
    context = np.concatenate([np.asarray(prompt), token_ids]).astype(np.int64)
    row = pack([context[:-1]])
    position = np.arange(len(prompt), len(context))
    placed = row.place(np.zeros_like(position), position, context[position])
    source, target, gather = map(torch.from_numpy, (placed.source, placed.target, placed.gather))
    scores = scorer(to_device(row, "cpu"), source, target, temperature=temperature)
    return scores.logprob[gather].numpy()


def _last_norm(state: dict[str, Tensor]) -> Tensor:
    return state["model.norm.weight"]
