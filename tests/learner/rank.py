"""A small learner that runs in one process or as a rank: `torchrun rank.py OUT` writes each rank's results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.algorithms.diagnostics import Diagnostics
from learner.batch.packing import pack, split
from learner.metrics.step_metrics import StepMetrics
from learner.model.attention import to_device
from learner.model.export import published_weights
from learner.model.loading import Policy
from learner.model.lora import add_adapters
from learner.model.parallel import World, checkpoint_activations, clip_gradients, full, join, shard
from learner.model.scorer import Scorer
from learner.training.checkpoint import TrainingProgress, restore_checkpoint, save_checkpoint
from learner.training.optimizer import apply_update, build_optimizer
from learner.training.trainer import Trainer
from protocol.learner_config import LearnerConfig, LoraConfig, OptimizerConfig
from tests.learner.configs import advantage_config, correction, loss_config, loss_of
from tests.learner.flat import flat_tokens
from tests.learner.tiny import VOCAB_SIZE, group, tiny_model

CONFIG = OptimizerConfig(eps=1e-3)
"""A large epsilon, so that AdamW does not amplify gradients that are only rounding errors."""


_TRAINED = {"num_steps": 3, "tokens_per_micro_batch": 64, "optimizer": OptimizerConfig(learning_rate=0.01, eps=1e-3)}
TRAINERS = {
    "grpo": LearnerConfig(**_TRAINED),
    "a reference, corrections over trajectories": LearnerConfig(
        **_TRAINED, loss=loss_config(kl_coefficient=0.1, corrections=(correction("truncate", scope="trajectory"),))
    ),
    "minibatches without signal": LearnerConfig(
        **_TRAINED, loss=loss_config(minibatches=4, corrections=(correction("second_moment"),))
    ),
    "gae in two minibatches": LearnerConfig(
        **_TRAINED, advantage=advantage_config(use="gae", lam=0.9), loss=loss_config(minibatches=2)
    ),
}


def diagnostics_of(rank: int) -> Diagnostics:
    """Returns the diagnostics of tokens that differ between ranks; the largest weight is on rank 0."""
    tokens = flat_tokens(rank + 1)
    weights = torch.linspace(0, 4 - rank, len(tokens.tokens), dtype=torch.float64)
    return loss_of(tokens.loss_tokens(importance=weights), loss_config())[1]


def train_groups(config: LearnerConfig, world: World) -> tuple[Trainer, list[StepMetrics]]:
    """Three steps of the real trainer on groups with contexts of different lengths.

    In the second step only two contexts have an advantage other than 0, in the third none, unless the loss has more
    terms.
    """
    policy = Policy(model=tiny_model(), tokenizer_files=())
    reference = Policy(model=tiny_model(seed=1), tokenizer_files=()) if config.loss.kl_coefficient else None
    trainer = Trainer(policy=policy, config=config, reference=reference, world=world)
    equal = [group(seed, rewards=(0.5,) * 4, cursor=seed) for seed in (20, 21)]
    batches = [[group(0), group(1)], [equal[0], group(10, num_contexts=(1, 1), rewards=(1.0, 0.0))], equal]
    return trainer, [trainer.train_step(batch, step=step) for step, batch in enumerate(batches)]


class Learner:
    """Tied embeddings and a value head. All ranks have the same contexts; each trains its part of them."""

    def __init__(
        self,
        world: World,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora: bool = False,
        recompute: bool = False,
    ) -> None:
        self.world, self.dtype = world, getattr(torch, dtype)
        model = tiny_model()
        if lora:
            add_adapters(model, LoraConfig(rank=4, targets=("q_proj", "down_proj")))
        if recompute:
            checkpoint_activations(model)
        self.policy = Policy(model=model, tokenizer_files=())
        self.scorer = Scorer(model, with_value_head=True)
        shard(self.scorer, world, dtype=dtype)
        self.optimizer = build_optimizer(self.scorer, CONFIG)

    def accumulate(self, step: int) -> None:
        """Adds the gradient of a weighted sum of log-probs and values; the last micro-batch of each rank is empty."""
        rng = np.random.default_rng(step)
        contexts = [rng.integers(0, VOCAB_SIZE, size=length) for length in rng.integers(4, 30, size=9)]
        own = split(contexts, budget=40, num_ranks=self.world.size)[self.world.rank]
        assert len(own) > 1
        for part in (*own, np.zeros(0, dtype=np.int64)):
            chosen = [contexts[each] for each in part]
            packed = pack(chosen)
            position = [np.arange(1, len(each)) for each in chosen]
            context = np.repeat(np.arange(len(chosen)), [len(each) for each in position])
            target = np.concatenate([each[1:] for each in chosen] or [part])
            placement = packed.place(context, np.concatenate([*position, part[:0]]), target)
            scores = self.scorer(
                to_device(packed, "cpu"), torch.from_numpy(placement.source), torch.from_numpy(placement.target)
            )
            weight = torch.from_numpy(np.sin(target)).float()
            gather = torch.from_numpy(placement.gather)
            values = scores.value[gather]
            ((weight * scores.logprob[gather]).sum() + (values - weight).square().sum()).backward()

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.accumulate(step)
            apply_update(self.scorer, self.optimizer, rate=0.01, clip_norm=1.0)

    def gradients(self) -> dict[str, Tensor]:
        """Unsharded, by name, tied ones once. All ranks must call it."""
        named = self.scorer.named_parameters()
        return {name: full(each.grad).clone() for name, each in named if each.grad is not None}

    def published(self) -> dict[str, Tensor]:
        """Rank 0 gets copies of the weights, the others an empty dict."""
        weights = published_weights(self.policy.model, world=self.world, dtype=self.dtype)
        return {name: each.clone() for name, each in weights.items()}

    def save(self, root: Path, step: int) -> Path:
        return save_checkpoint(
            root,
            policy=self.policy,
            optimizer=self.optimizer,
            progress=TrainingProgress(step, num_skipped_updates=3, num_consecutive_skips=1),
            keep=1,
            value_head=self.scorer.value_head,
            world=self.world,
        )

    def restore(self, folder: Path) -> TrainingProgress:
        return restore_checkpoint(
            folder,
            policy=self.policy,
            optimizer=self.optimizer,
            value_head=self.scorer.value_head,
            world=self.world,
        )


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join("cpu") as world:
        found: dict[str, object] = {}
        found |= _use_collectives(world)
        for name, recompute in (("plain", False), ("recomputed", True)):
            found |= _differentiate(world, out, name=name, recompute=recompute)
        found |= _skip_a_nan(world)
        found |= _checkpoint(world, out)
        _resume(world, out)
        found |= _mix_precisions(world)
        for name, config in TRAINERS.items():
            found[name] = _train_groups(world, out, name=name, config=config)
        (out / f"rank-{world.rank}.json").write_text(json.dumps(found))


def _use_collectives(world: World) -> dict[str, object]:
    lead = world.rank == 0
    large = bytes(range(256)) * 5000
    total = world.reduce(diagnostics_of(world.rank))
    return {
        "sum": world.sum(torch.tensor([1, 10 * world.rank])).tolist(),
        "bytes": [world.broadcast(data if lead else None) == data for data in (b"", b"x", large)],
        "all": [world.all(True), world.all(lead), world.all(False)],
        "reduced": total.values(),
    }


def _differentiate(world: World, out: Path, *, name: str, recompute: bool) -> dict[str, object]:
    learner = Learner(world, recompute=recompute)
    learner.accumulate(0)
    before = learner.gradients()
    norm = clip_gradients(learner.scorer.parameters(), 1.0)
    after = learner.gradients()
    if world.rank == 0:
        save_file(before, out / f"{name}-gradients.safetensors")
        save_file(after, out / f"{name}-clipped.safetensors")
    return {f"{name} norm": norm}


def _skip_a_nan(world: World) -> dict[str, object]:
    learner = Learner(world)
    before = learner.published()
    learner.accumulate(0)
    if world.rank == 1:
        sharded = cast(DTensor, cast(torch.nn.Embedding, learner.policy.model.get_input_embeddings()).weight.grad)
        sharded.to_local().fill_(torch.nan)
    norm = apply_update(learner.scorer, learner.optimizer, rate=0.01, clip_norm=1.0)
    after = learner.published()
    return {"nan norm": norm, "nan changed": any(not torch.equal(before[name], after[name]) for name in before)}


def _checkpoint(world: World, out: Path) -> dict[str, object]:
    """Two steps and a checkpoint; then two more steps, and the same two resumed from the checkpoint."""
    learner = Learner(world)
    learner.train(0, 2)
    torch.manual_seed(100 + world.rank)
    folder = learner.save(out / "of-two-ranks", 2)
    noise = torch.rand(4)
    learner.train(2, 4)
    resumed = Learner(world)
    state = resumed.restore(folder)
    same_noise = torch.equal(torch.rand(4), noise)
    resumed.train(2, 4)
    wanted, got = learner.published(), resumed.published()
    return {
        "state": [state.step, state.num_skipped_updates, state.num_consecutive_skips],
        "same noise": same_noise,
        "bit for bit": all(torch.equal(wanted[name], got[name]) for name in wanted),
        "noise": noise.tolist(),
    }


def _resume(world: World, out: Path) -> None:
    """Resumes the checkpoint of one process; and trains adapters from the start."""
    learner = Learner(world)
    learner.restore(out / "of-one-rank" / "step-00000002")
    learner.train(2, 4)
    adapted = Learner(world, lora=True)
    adapted.train(0, 2)
    for name, each in (("trained-on", learner), ("adapted", adapted)):
        weights = each.published()
        if world.rank == 0:
            save_file(weights, out / f"{name}.safetensors")


def _mix_precisions(world: World) -> dict[str, object]:
    learner = Learner(world, dtype="bfloat16", recompute=True)
    learner.accumulate(0)
    gradients = {str(each.dtype) for each in learner.gradients().values()}
    norm = clip_gradients(learner.scorer.parameters(), 1.0)
    return {
        "bf16 norm": norm,
        "gradients": sorted(gradients),
        "masters": sorted({str(each.dtype) for each in learner.scorer.parameters()}),
        "published": sorted({str(each.dtype) for each in learner.published().values()}),
    }


def _train_groups(world: World, out: Path, *, name: str, config: LearnerConfig) -> list[list[float]]:
    trainer, stepped = train_groups(config, world)
    weights = published_weights(trainer.policy.model, world=world, dtype=torch.float32)
    if world.rank == 0:
        save_file(weights, out / f"{name}.safetensors")
    return [[each.values["learner/loss"], each.values["learner/grad_norm"]] for each in stepped]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
