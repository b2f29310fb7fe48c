"""The toy task's initial policy: a tiny model that is trained to copy, then on demonstrations with noise."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from learner.warmstart.induction_init import induction_pretrain, wire_induction
from learner.warmstart.sft import Demonstrations, OnProgress, supervised_finetune
from protocol.errors import DataError
from protocol.learner_config import OptimizerConfig

DISTINCT_STEPS = 300
REPEATED_STEPS = 400
IMITATION_STEPS = 800
NUM_STEPS = {"copying": DISTINCT_STEPS + REPEATED_STEPS, "imitation": IMITATION_STEPS}
"""Phase of `OnProgress` → its steps at most."""
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=50)


def build_toy_model(
    *, vocab_size: int, eos_token_id: int, pad_token_id: int, hidden_size: int = 64, num_layers: int = 2, seed: int
) -> Qwen2ForCausalLM:
    """A random float32 Qwen2 from `seed`; 113,472 parameters with a vocabulary of 98 and default sizes."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def warm_start(
    model_dir: Path,
    *,
    demonstrations: Path,
    tokenizer_dir: Path,
    seed: int,
    repeated_steps: int = REPEATED_STEPS,
    imitation_steps: int = IMITATION_STEPS,
    on_progress: OnProgress | None = None,
) -> None:
    """Trains the toy task's initial policy and saves it, with its tokenizer, as a Hugging Face folder `model_dir`.

    It first trains copying of random sequences of the demonstrations' `symbols`, then imitation of the demonstrations,
    whose `permutable` ids are permuted in every context.
    Raises: DataError if the demonstrations or the tokenizer cannot be used.
    """
    tokenizer, end, pad = _load_tokenizer(tokenizer_dir)
    examples = Demonstrations.load(demonstrations)
    if examples.symbols is None or int(examples.token_ids.max()) >= len(tokenizer):
        raise DataError(
            f"demonstrations {demonstrations} must have `symbols` in their metadata and ids below the "
            f"{len(tokenizer)} of the tokenizer in {tokenizer_dir}; write both again"
        )
    model = build_toy_model(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=pad, seed=seed)
    wire_induction(model, seed=seed)
    induction_pretrain(
        model,
        symbols=examples.symbols,
        max_distinct_steps=DISTINCT_STEPS,
        repeated_steps=repeated_steps,
        optimizer=OPTIMIZER,
        seed=seed,
        on_progress=on_progress,
    )
    supervised_finetune(
        model,
        examples,
        steps=imitation_steps,
        optimizer=OPTIMIZER,
        permute=examples.permutable,
        seed=seed,
        on_progress=on_progress,
    )
    model.eval()
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def _load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, int, int]:
    """(tokenizer, id of its end token, id of its padding token)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load a tokenizer from {folder}: {error}") from None
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not isinstance(end, int) or not isinstance(pad, int):
        raise DataError(f"the tokenizer in {folder} must have an eos_token and a pad_token; it is not a toy tokenizer")
    return tokenizer, end, pad
