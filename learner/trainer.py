"""One training step: groups in, a better policy and its metrics out.

    groups ─► advantages ─► minibatches ─► [proximal log-probs] ─► per minibatch:
                                            only if needed           micro-batches: log-probs ─► loss ─► backward
                                                                     then clip, AdamW

The proximal policy is the policy at the start of the step. With one minibatch that is the model itself, and its
log-probs are those of the training forward, detached. A forward of its own is paid for with several minibatches, and
for the `trajectory` scope, whose weights need all contexts of a trajectory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.advantage import group_advantages
from learner.batching import MicroBatch, Minibatch, flatten, make_minibatches
from learner.corrections import importance_weights
from learner.loss import Diagnostics, policy_loss
from learner.optimizer import apply_update, build_optimizer, learning_rate
from learner.policy import Policy, token_logprobs
from learner.step_metrics import Clock, StepMetrics, summarise
from protocol.config import LearnerConfig
from protocol.types import TrajectoryGroup


@dataclass(frozen=True, slots=True)
class _Columns:
    """A micro-batch's columns on the device: token_ids [R, T], the others [N]."""

    token_ids: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    context: Tensor
    trajectory: Tensor
    behavior: Tensor
    advantage: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Proximal:
    """What the proximal policy says of a micro-batch before the step: log-probs and importance weights, [N]."""

    proximal: Tensor
    importance: Tensor


class Trainer:
    """Owns the optimiser of a policy. `temperature` is that of sampling: learner logits are divided by it."""

    def __init__(
        self, *, policy: Policy, config: LearnerConfig, temperature: float = 1.0, num_skipped_updates: int = 0
    ) -> None:
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.optimizer = build_optimizer(policy.model, config.optimizer)
        self.num_skipped_updates = num_skipped_updates

    def train_step(self, groups: Sequence[TrajectoryGroup], *, step: int) -> StepMetrics:
        """Trains the policy from version `step` to `step + 1` on one batch of groups.

        Raises: MalformedMessage where a group cannot be scored, or holds tokens of a version above `step`.
        """
        clock = Clock()
        minibatches = self.prepare(groups, step=step)
        clock.lap("prepare")
        fixed = self.proximal(minibatches)
        clock.lap("proximal")

        rate = learning_rate(step, num_steps=self.config.num_steps, config=self.config.optimizer)
        watched = Diagnostics()
        norms: list[float] = []
        for number, minibatch in enumerate(minibatches):
            watched += self.accumulate(minibatch, fixed=fixed[number] if fixed else None, clock=clock)
            norms.append(
                apply_update(self.policy.model, self.optimizer, rate=rate, clip_norm=self.config.optimizer.clip_norm)
            )
            clock.lap("update")
        num_skipped = sum(not math.isfinite(norm) for norm in norms)
        self.num_skipped_updates += num_skipped
        return summarise(
            groups, minibatches, watched, norms, step=step, rate=rate, num_skipped=num_skipped, clock=clock
        )

    def accumulate(
        self, minibatch: Minibatch, *, fixed: Sequence[Proximal] | None = None, clock: Clock | None = None
    ) -> Diagnostics:
        """Adds the gradient of one minibatch to the parameters' and returns what was watched."""
        clock = clock or Clock()
        loss_config = self.config.loss
        watched = Diagnostics()
        for number, micro_batch in enumerate(minibatch.micro_batches):
            columns = self._columns(micro_batch)
            logprobs, entropy = self._logprobs(columns)
            current = fixed[number] if fixed else self._fix([columns], [logprobs.detach()])[0]
            loss, seen = policy_loss(
                logprobs=logprobs,
                proximal=current.proximal,
                behavior=columns.behavior,
                importance=current.importance,
                advantages=columns.advantage,
                weight=columns.weight,
                entropy=entropy,
                clip_low=loss_config.clip_low,
                clip_high=loss_config.clip_high,
            )
            clock.lap("forward")
            loss.backward()
            clock.lap("backward")
            watched += seen
        return watched

    def prepare(self, groups: Sequence[TrajectoryGroup], *, step: int) -> list[Minibatch]:
        """The minibatches of one step, advantages and weights in them. Raises: MalformedMessage."""
        config = self.config
        batch = flatten(
            groups,
            [group_advantages(group, config.advantage) for group in groups],
            last_context_only=config.ablation == "last-context",
        )
        return make_minibatches(
            batch,
            num_minibatches=config.loss.minibatches,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            aggregation=config.loss.aggregation,
            constant=config.loss.constant,
            oldest_version=step - config.staleness_bound,
            newest_version=step,
        )

    @torch.no_grad()
    def proximal(self, minibatches: Sequence[Minibatch]) -> list[list[Proximal]] | None:
        """By minibatch and micro-batch what the current policy says; None where the training forward will tell."""
        correction = self.config.loss.correction
        whole_trajectories = correction.kind != "none" and correction.scope == "trajectory"
        if len(minibatches) == 1 and not whole_trajectories:
            return None
        fixed = []
        for minibatch in minibatches:
            columns = [self._columns(micro_batch) for micro_batch in minibatch.micro_batches]
            fixed.append(self._fix(columns, [self._logprobs(each)[0] for each in columns]))
        return fixed

    def _fix(self, columns: Sequence[_Columns], proximal: Sequence[Tensor]) -> list[Proximal]:
        """Importance weights over all given micro-batches together: a scope may reach over several of them."""
        if not columns:
            return []
        scope = self.config.loss.correction.scope
        segment = None if scope == "token" else torch.cat([getattr(each, scope) for each in columns])
        behavior = torch.cat([each.behavior for each in columns])
        weights = importance_weights(torch.cat(list(proximal)), behavior, segment, config=self.config.loss.correction)
        parts = weights.split([len(each) for each in proximal])
        return [Proximal(proximal=each, importance=part) for each, part in zip(proximal, parts, strict=True)]

    def _logprobs(self, columns: _Columns) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            self.policy.model,
            token_ids=columns.token_ids,
            row=columns.row,
            position=columns.position,
            target=columns.target,
            temperature=self.temperature,
        )

    def _columns(self, micro_batch: MicroBatch) -> _Columns:
        tokens = micro_batch.tokens
        arrays = (
            micro_batch.token_ids,
            micro_batch.row,
            tokens.position,
            tokens.token_id,
            tokens.context,
            tokens.trajectory,
            tokens.behavior_logprob,
            tokens.advantage,
            micro_batch.weight,
        )
        return _Columns(*(torch.from_numpy(array).to(self.policy.device) for array in arrays))
