"""A tiny untrained model with a word-level vocabulary, for the examples and for the skeleton of `palimpsest init`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from protocol.atomic_write import atomic_path

PAD, END = "<pad>", "<end>"


def make_tiny_model(folder: Path, *, words: Sequence[str], seed: int = 0) -> None:
    """Writes a Hugging Face folder: Qwen2 with 2 layers of width 32, one token per word, `<end>` ends a sequence.

    Unknown words are encoded as `<pad>`. About 22,000 parameters for 20 words. `folder` must not exist yet.
    """
    vocabulary = [PAD, END, *dict.fromkeys(words)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=vocabulary.index(END),
        pad_token_id=vocabulary.index(PAD),
    )
    torch.manual_seed(seed)
    transformers_logging.disable_progress_bar()
    with atomic_path(folder) as temporary:
        Qwen2ForCausalLM(config).save_pretrained(temporary)
        tokenizer.save(str(temporary / "tokenizer.json"))
        special = {"eos_token": END, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast"}
        (temporary / "tokenizer_config.json").write_text(json.dumps(special) + "\n")
