"""A small Qwen2 that can copy, has read the corpus, and imitates the traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from bpe import END, PAD, word_ids, write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learner.induction import induction_pretrain, wire_induction
from learner.sft import Demonstrations, OnProgress, supervised_finetune
from protocol.config import OptimizerConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=2e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, schedule="linear", final_fraction=0.2
)
MAX_PASSAGE_TOKENS = 160


def build_model(tokenizer: Tokenizer, *, seed: int) -> Qwen2ForCausalLM:
    """2.9 million parameters (at 8,192 tokens), more than half of them embeddings; float32."""
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def passages_as_demonstrations(texts: Sequence[str], tokenizer: Tokenizer) -> Demonstrations:
    """Every passage as a context of its own, at most MAX_PASSAGE_TOKENS long, all of it trained on."""
    rows = [encoding.ids[:MAX_PASSAGE_TOKENS] for encoding in tokenizer.encode_batch(list(texts))]
    rows = [row for row in rows if len(row) > 1]
    ids = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Demonstrations(ids, np.ones(len(ids), dtype=np.bool_), offsets)


def pretrain(
    out: Path,
    *,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    copying_steps: int,
    language_steps: int,
    seed: int,
    on_copying: OnProgress,
    on_language: OnProgress,
) -> None:
    """Copying first, on random words, then language on the passages; saves a model folder."""
    model = build_model(tokenizer, seed=seed)
    wire_induction(model, seed=seed)
    induction_pretrain(
        model,
        symbols=word_ids(tokenizer),
        max_distinct_steps=copying_steps,
        repeated_steps=0,
        optimizer=OPTIMIZER,
        seed=seed,
        on_progress=on_copying,
    )
    supervised_finetune(
        model,
        passages_as_demonstrations(texts, tokenizer),
        steps=language_steps,
        batch_size=16,
        optimizer=OPTIMIZER,
        seed=seed,
        on_progress=on_language,
    )
    save_model(model, tokenizer, out)


def imitate(
    start: Path,
    out: Path,
    *,
    tokenizer: Tokenizer,
    demonstrations: Path,
    steps: int,
    seed: int,
    on_progress: OnProgress,
) -> None:
    """Supervised fine-tuning of the model in `start` on what the script wrote; saves a model folder."""
    model = cast(Qwen2ForCausalLM, AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32))
    supervised_finetune(
        model,
        Demonstrations.load(demonstrations),
        steps=steps,
        batch_size=8,
        optimizer=OPTIMIZER,
        seed=seed,
        on_progress=on_progress,
    )
    save_model(model, tokenizer, out)


def save_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """A Hugging Face folder with its tokenizer; it appears only when it is whole."""
    aside = out.with_name(f".writing-{out.name}")
    model.eval()
    model.save_pretrained(aside)
    write_tokenizer(tokenizer, aside)
    aside.rename(out)
