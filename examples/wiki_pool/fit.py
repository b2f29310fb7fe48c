"""A small Qwen2, trained to copy, then on the corpus, then to imitate the traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from bpe import END, PAD, START, word_ids, write_tokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learner.warmstart.induction_init import wire_induction
from learner.warmstart.sft import Demonstrations, NextTokenFit, OnProgress, padded
from protocol.atomic_write import atomic_path
from protocol.learner_config import OptimizerConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=2e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, schedule="linear", final_fraction=0.1
)
LATER_ROUNDS = OPTIMIZER.model_copy(update={"learning_rate": 5e-4})
MAX_PASSAGE_TOKENS = 160
_BATCH = 16
_SCRAMBLED_SHARE = 0.75
_GARBLED_SHARE = 0.4
_LOOP_SHARE = 0.3
_MAX_GAP = 400
"""Tokens between a copy and its original, at most: the length of an observation."""


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
    """One context per passage, at most MAX_PASSAGE_TOKENS long; every token is trained on."""
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
    """Trains copying on random words, then language on the passages; saves a model folder.

    A copying step follows each language step: language steps alone lose 97 % of the copying accuracy in 150 steps.
    """
    rng = np.random.default_rng([seed, 0xBA5E])
    words, passages = word_ids(tokenizer), passages_as_demonstrations(texts, tokenizer)
    model = build_model(tokenizer, seed=seed)
    wire_induction(model, seed=seed)
    fit = NextTokenFit(model, OPTIMIZER, num_steps=copying_steps + 2 * language_steps)
    for step in range(1, copying_steps + 1):
        fit.step(*copying_batch(words, max_gap=12, rng=rng))
        on_copying("copying", step, fit.mean_loss)
    for step in range(1, language_steps + 1):
        fit.step(*padded(passages, rng.integers(len(passages), size=_BATCH)))
        fit.step(*copying_batch(words, max_gap=_MAX_GAP, rng=rng))
        on_language("language", step, fit.mean_loss)
    save_model(model, tokenizer, out)


def copying_batch(
    words: range, *, max_gap: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """16 distinct words, a gap of other words, then a copy without the first few; ids int64 and mask bool [B, L].

    The mask is true in the copy except for its first word, which cannot be predicted.
    """
    num, gap, start = 16, int(rng.integers(0, max_gap + 1)), int(rng.integers(0, 8))
    drawn = np.stack([rng.choice(np.asarray(words), size=num + gap, replace=False) for _ in range(_BATCH)])
    ids = np.concatenate([drawn, drawn[:, start:num]], axis=1).astype(np.int64)
    mask = np.broadcast_to(np.arange(ids.shape[1]) > num + gap, ids.shape)
    return ids, mask.copy()


@dataclass(frozen=True, slots=True)
class Lesson:
    """Training steps on one file of demonstrations. Without `system`, contexts start at their second message.

    With `exchange`, most contexts get a random permutation of all ids except the fixed ones, so that the model can
    predict them only by copying; otherwise it memorises the few hundred questions and does not copy on others. In
    some contexts the copied ids are replaced, so that the model learns to end a piece correctly after wrong words.
    """

    demonstrations: Path
    steps: int
    num_contexts: int
    system: bool
    exchange: bool


def imitate(
    start: Path,
    out: Path,
    *,
    tokenizer: Tokenizer,
    lessons: Sequence[Lesson],
    fixed: frozenset[int],
    optimizer: OptimizerConfig,
    seed: int,
    on_progress: OnProgress,
) -> None:
    """Fine-tunes the model in `start` on the lessons, in order; saves a model folder.

    fixed: ids that `exchange` does not permute.
    """
    rng = np.random.default_rng([seed, 0x1417])
    model = cast(Qwen2ForCausalLM, AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32))
    free = np.array([token for token in word_ids(tokenizer) if token not in fixed])
    fit = NextTokenFit(model, optimizer, num_steps=sum(lesson.steps for lesson in lessons))
    for lesson in lessons:
        examples = Demonstrations.load(lesson.demonstrations)
        by_length = np.argsort(examples.lengths, kind="stable")
        cut = 0 if lesson.system else _system_tokens(examples, tokenizer)
        for _ in range(lesson.steps):
            at = int(rng.integers(max(1, len(by_length) - lesson.num_contexts + 1)))
            ids, mask = padded(examples, by_length[at : at + lesson.num_contexts])
            ids, mask = ids[:, cut:], mask[:, cut:]
            if lesson.exchange:
                ids = scrambled(ids, free, share=_SCRAMBLED_SHARE, rng=rng)
                ids, mask = garbled(ids, mask, free, share=_GARBLED_SHARE, rng=rng)
            fit.step(ids, mask)
            on_progress("imitation", fit.num_steps_done, fit.mean_loss)
    save_model(model, tokenizer, out)


def _system_tokens(examples: Demonstrations, tokenizer: Tokenizer) -> int:
    """The number of a context's tokens before its second message."""
    first = examples.token_ids[: examples.offsets[1]]
    return int(np.flatnonzero(first == tokenizer.token_to_id(START))[1])


def scrambled(
    token_ids: NDArray[np.int64], free: NDArray[np.int64], *, share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`token_ids` [B, L]; in a `share` of the rows, the ids in `free` [n] are permuted, each row differently."""
    rows = token_ids.copy()
    for row in rows:
        if rng.random() < share:
            mapping = np.arange(max(int(row.max()), int(free.max())) + 1)
            mapping[free] = rng.permutation(free)
            row[:] = mapping[row]
    return rows


def garbled(
    token_ids: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    free: NDArray[np.int64],
    *,
    share: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Replaces half of the trained ids that are in `free` [n] in a `share` of the rows, and masks all of these ids.

    In some of these rows all of them get the same id, as in a repetition loop. token_ids int64, loss_mask bool, [B, L].
    """
    chosen = (rng.random(len(token_ids)) < share)[:, None]
    content = loss_mask & np.isin(token_ids, free) & chosen
    words = rng.choice(free, size=token_ids.shape)
    loops = rng.random(len(token_ids)) < _LOOP_SHARE
    words[loops] = words[loops, :1]
    replaced = content & ((rng.random(token_ids.shape) < 0.5) | loops[:, None])
    return np.where(replaced, words, token_ids), loss_mask & ~content


def save_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a Hugging Face folder with its tokenizer, complete or not at all."""
    model.eval()
    with atomic_path(out) as folder:
        model.save_pretrained(folder)
        write_tokenizer(tokenizer, folder)
