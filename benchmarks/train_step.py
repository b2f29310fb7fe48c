"""Seconds of one training step at the shape of the demo: 16 groups x 8 trajectories x 3 contexts of about 55 tokens.

    python benchmarks/train_step.py [--quick] [--tokens-per-micro-batch 4096] [--steps 10]

A random toy-sized Qwen2 (113k parameters), one torch thread, fp32. Prints the median of the steps by phase; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from learner.policy import Policy
from learner.trainer import Trainer
from protocol.config import LearnerConfig, LossConfig, OptimizerConfig
from protocol.types import Context, Question, Trajectory, TrajectoryGroup, VersionSpan

VOCAB_SIZE = 98


def toy_model() -> Qwen2ForCausalLM:
    """The model of the demo with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return Qwen2ForCausalLM(config).eval()


def context(rng: np.random.Generator) -> Context:
    """22-26 tokens read, 7 sampled, about 18 read, 6 sampled."""
    prompt, action, observation, memory = (
        int(rng.integers(*bounds)) for bounds in ((22, 27), (5, 10), (16, 22), (4, 8))
    )
    spans = ((prompt, prompt + action), (prompt + action + observation, prompt + action + observation + memory))
    length = spans[1][1]
    mask = np.zeros(length, dtype=np.bool_)
    for start, end in spans:
        mask[start:end] = True
    return Context(
        token_ids=rng.integers(0, VOCAB_SIZE, size=length, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, -4.6, 0.0).astype(np.float32),
        policy_versions=tuple(VersionSpan(start, end, 0, 0) for start, end in spans),
    )


def group(rng: np.random.Generator, cursor: int) -> TrajectoryGroup:
    """8 trajectories of 2 to 4 contexts, rewards 0 or 1."""
    trajectories = tuple(
        Trajectory(
            contexts=tuple(context(rng) for _ in range(int(rng.integers(2, 5)))), reward=float(rng.integers(0, 2))
        )
        for _ in range(8)
    )
    question = Question(id=str(cursor), text="", answers=())
    return TrajectoryGroup(run_id="bench", cursor=cursor, attempt=0, question=question, trajectories=trajectories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="3 steps")
    arguments = parser.parse_args()
    num_steps = 3 if arguments.quick else arguments.steps
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    groups = [group(rng, cursor) for cursor in range(16)]
    config = LearnerConfig(
        staleness_bound=1_000_000,
        tokens_per_micro_batch=arguments.tokens_per_micro_batch,
        loss=LossConfig(aggregation="token"),
        optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.99)),
    )
    trainer = Trainer(policy=Policy(model=toy_model(), tokenizer_files=()), config=config)
    trainer.train_step(groups, step=0)
    cpu_start = time.process_time()
    steps = [trainer.train_step(groups, step=step) for step in range(1, num_steps + 1)]
    cpu_s = (time.process_time() - cpu_start) / num_steps
    first = steps[0]
    print(f"{first.num_contexts} contexts, {first.num_input_tokens} tokens, {first.num_tokens} trained")
    phases = ("plan", "advantage", "forward", "backward", "update")
    report = {f"{phase}_s": round(statistics.median(step.seconds[phase] for step in steps), 4) for phase in phases}
    report["step_s"] = round(statistics.median(step.step_s for step in steps), 4)
    report["cpu_s"] = round(cpu_s, 4)  # what a step takes where the core is not shared
    report["unique_fraction"] = round(first.unique_fraction, 3)
    report["tokens_per_s"] = round(statistics.median(step.tokens_per_s for step in steps))
    for name, value in report.items():
        print(f"{name:18} {value}")
    sizes = {"num_contexts": first.num_contexts, "num_input_tokens": first.num_input_tokens}
    print(json.dumps({"num_steps": num_steps, **sizes, **report}))


if __name__ == "__main__":
    main()
