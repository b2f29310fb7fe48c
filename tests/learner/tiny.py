"""Small random policies and groups of uneven contexts, made from seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from protocol.types import Context, Question, Status, Trajectory, TrajectoryGroup, VersionSpan

VOCAB_SIZE = 48


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random Qwen2 of 2 layers, hidden 32, grouped heads."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    return model.double() if dtype is torch.float64 else model


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """A complete Hugging Face folder: config, weights, tokenizer."""
    tiny_model(seed=seed).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def context(rng: np.random.Generator, *, length: int, versions: tuple[int, ...] = (0,)) -> Context:
    """Two stretches of sampled tokens, each cut into spans of the given versions; position 0 is never sampled."""
    mask = np.zeros(length, dtype=np.bool_)
    spans: list[VersionSpan] = []
    middle = max(2, length // 2)
    for start, end in ((int(rng.integers(1, middle)), middle), (int(rng.integers(middle, length)), length)):
        mask[start:end] = True
        cuts = np.linspace(start, end, num=len(versions) + 1).astype(int)
        spans += [
            VersionSpan(int(a), int(b), version, version)
            for a, b, version in zip(cuts[:-1], cuts[1:], versions, strict=True)
            if b > a
        ]
    logprobs = np.where(mask, -rng.exponential(1.0, size=length) - 3.2, 0.0).astype(np.float32)
    ids = rng.integers(0, VOCAB_SIZE, size=length, dtype=np.int32)
    return Context(token_ids=ids, loss_mask=mask, behavior_logprobs=logprobs, policy_versions=tuple(spans))


def group(
    seed: int,
    *,
    num_contexts: tuple[int, ...] = (3, 1, 2, 4),
    rewards: tuple[float, ...] = (1.0, 0.0, 0.5, 0.0),
    statuses: tuple[Status, ...] | None = None,
    versions: tuple[int, ...] = (0,),
    lengths: tuple[int, int] = (4, 30),
    cursor: int = 0,
) -> TrajectoryGroup:
    """A group whose trajectories have the given numbers of contexts and rewards."""
    rng = np.random.default_rng(seed)
    statuses = statuses or (Status.COMPLETED,) * len(rewards)
    trajectories = tuple(
        Trajectory(
            contexts=tuple(context(rng, length=int(rng.integers(*lengths)), versions=versions) for _ in range(k)),
            reward=reward,
            status=status,
            reward_parts={"em": reward},
            stats={"num_searches": float(k)},
            answer="w1",
        )
        for k, reward, status in zip(num_contexts, rewards, statuses, strict=True)
    )
    question = Question(id=f"q{cursor}", text="what is w1 ?", answers=("w1",))
    return TrajectoryGroup(run_id="test", cursor=cursor, attempt=0, question=question, trajectories=trajectories)
