"""A small model, and weights derived from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer


def save_model(folder: Path) -> Path:
    """Saves a random one-layer Qwen2 with the toy's tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def scaled_weights(model: Path, *, scale: float) -> bytes:
    """Returns a safetensors file with all tensors of the model multiplied by `scale`."""
    return save({name: tensor * scale for name, tensor in load_file(model / "model.safetensors").items()})


def nudged(data: bytes, *, seed: int) -> bytes:
    """Returns a safetensors file in which about 1 % of the values are one ULP larger."""
    start = 8 + int.from_bytes(data[:8], "little")
    values = np.frombuffer(data[start:], np.uint32).copy()
    values[np.random.default_rng(seed).random(len(values)) < 0.01] += 1
    return data[:start] + values.tobytes()
