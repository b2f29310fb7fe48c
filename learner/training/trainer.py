"""One training step: advantages, corrected and clipped policy gradient over micro-batches, gradient clip, AdamW.

    groups ─► flatten ─► advantages, plan ─► pre-pass, if a token's loss depends on other micro-batches ─► corrections
        ─► for each minibatch: forward, loss, backward of its micro-batches ─► update

The plan leaves out contexts whose advantages are all 0 if their loss is then 0 (learner/batch/selection.py). The
proximal policy is the policy at the start of the step. With one minibatch it is the model itself: its
log-probs are those of the training forward pass, detached. A pre-pass (one more forward pass of the batch) is needed
for several minibatches, corrections over trajectories or the batch, a value head, or a KL in the reward. With the last
two, advantages are known only after it, and nothing is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.algorithms.advantages import Advantages
from learner.algorithms.diagnostics import Diagnostics
from learner.algorithms.estimators import make_estimator, token_advantages
from learner.algorithms.importance_weights import correction_weights, make_corrections, needs_prepass, widest_scope
from learner.algorithms.losses import Loss, approx_kl
from learner.algorithms.token_data import TokenData
from learner.batch.flatten import Batch, flatten
from learner.batch.microbatches import MicroBatch, StepPlan, make_plan, trained_tokens
from learner.batch.selection import Bools, Selection, everything, select
from learner.batch.step_tokens import step_tokens
from learner.metrics.step_metrics import Clock, StepMetrics, summarise
from learner.model.attention import to_device
from learner.model.loading import Policy
from learner.model.parallel import World, shard
from learner.model.scorer import Scorer, Scores
from learner.training.optimizer import SkipGuard, apply_update, build_optimizer, learning_rate, value_learning_rate
from learner.training.step_work import step_work
from protocol.learner_config import LearnerConfig
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)


class Trainer:
    """Trains a policy with the algorithm of the config. It owns the optimizer.

    temperature   sampling temperature; the learner's logits are divided by it
    world         the ranks over which policy and reference are sharded; every rank calls `train_step` with the same
                  groups and trains only its own micro-batches
    base_dir      folder to which relative paths in options of imported algorithms are relative

    Raises (on creation): ConfigError if an algorithm cannot be loaded.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        config: LearnerConfig,
        temperature: float = 1.0,
        reference: Policy | None = None,
        world: World | None = None,
        base_dir: Path | None = None,
    ) -> None:
        if config.loss.kl_coefficient and reference is None:
            raise ValueError(f"learner.loss.kl_coefficient = {config.loss.kl_coefficient} needs a reference policy")
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.world = world or World()
        self.estimator = make_estimator(config.advantage, base_dir=base_dir)
        self.loss = Loss(config.loss, base_dir=base_dir)
        self.corrections = make_corrections(config.loss.corrections, base_dir=base_dir)
        self.scorer = Scorer(policy.model, with_value_head=self.estimator.needs_values)
        shard(self.scorer, self.world, dtype=config.dtype)
        self.reference = None
        if reference is not None:
            self.reference = Scorer(reference.model).requires_grad_(False)
            shard(self.reference, self.world, dtype=config.dtype)
        self.optimizer = build_optimizer(self.scorer, config.optimizer)
        self.guard = SkipGuard(max_consecutive=config.optimizer.max_consecutive_skips)

    def train_step(self, groups: Sequence[TrajectoryGroup], *, step: int) -> StepMetrics:
        """Trains the policy from version `step` to `step + 1` on one batch of groups.

        Raises: MalformedMessage if a group cannot be scored, or has tokens of a version above `step`;
        DivergenceError if too many updates in a row were not finite.
        """
        clock = Clock(self.policy.device)
        batch = flatten(groups, last_context_only=self.config.ablation == "last-context")
        plan = self.plan(batch, step=step, clock=clock)
        if plan.trained.any() and not any(plan.has_signal) and self.world.rank == 0:
            log.warning("every advantage of step %d is 0: nothing was trained", step)
        tokens = self.prepare(batch, plan, step=step, clock=clock)
        rate, value_rate = self._rates(step)
        total, norms = Diagnostics(), []
        for minibatch, has_signal in zip(plan.minibatches, plan.has_signal, strict=True):
            diagnostics = self.accumulate(minibatch, tokens, clock=clock)
            norms.append(self._update(diagnostics, rate=rate, value_rate=value_rate, has_signal=has_signal))
            total += diagnostics
            clock.lap("update")
        num_forwards = (tokens.proximal is not None) + (tokens.reference is not None)
        return summarise(
            batch,
            plan,
            self.world.reduce(total),
            step_work(plan, self.policy.model, num_forwards=num_forwards, world=self.world),
            norms=norms,
            advantage_mean=float(tokens.advantages.double().mean()) if len(batch.sampled) else 0.0,
            step=step,
            rate=rate,
            num_skipped=sum(not math.isfinite(norm) for norm in norms),
            clock=clock,
        )

    def plan(self, batch: Batch, *, step: int, clock: Clock | None = None) -> StepPlan:
        """Minibatches, this rank's micro-batches, and the advantages unless they need a forward pass.

        Raises: MalformedMessage; ExtensionError from an imported estimator.
        """
        config, clock = self.config, clock or Clock(self.policy.device)
        versions = {"oldest_version": step - config.staleness_bound, "newest_version": step}
        trained = trained_tokens(batch, **versions)
        advantages = None
        if not (self.estimator.needs_values or self._kl_in_reward):
            clock.lap("plan")
            advantages = token_advantages(batch.credit(trained), config.advantage, self.estimator)
            clock.lap("advantage")
        plan = make_plan(
            batch,
            num_minibatches=config.loss.minibatches,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            aggregation=config.loss.aggregation,
            constant=config.loss.constant,
            selection=self._selection(batch, trained, advantages),
            share=config.prefix_sharing,
            rank=self.world.rank,
            num_ranks=self.world.size,
            **versions,
        )
        clock.lap("plan")
        return replace(plan, advantages=advantages)

    def _selection(self, batch: Batch, trained: Bools, advantages: Advantages | None) -> Selection:
        if advantages is None or not self.loss.is_zero_without_advantage:
            return everything(trained)
        return select(
            batch.sampled,
            trained,
            advantages.advantage,
            scope=widest_scope(self.corrections),
            skip=self.config.skip_zero_advantage and not self.config.check_drift,
        )

    def prepare(self, batch: Batch, plan: StepPlan, *, step: int, clock: Clock | None = None) -> TokenData:
        """Computes the columns of a batch's tokens that must be known before training: advantages, weights, log-probs.

        Runs up to two forward passes of the batch: the pre-pass if it is needed, and that of the reference policy.
        Log-probs and importance weights are those of the plan's `selection.scored`, 0 for other tokens.
        """
        clock, loss = clock or Clock(self.policy.device), self.config.loss
        advantages, scored = plan.advantages, plan.selection.scored
        proximal = values = reference = penalty = importance = None
        if self._needs_prepass(plan):
            proximal, values = self._score_batch(self.scorer, batch, plan)
            clock.lap("proximal")
        if self.reference is not None:
            reference, _ = self._score_batch(self.reference, batch, plan)
            clock.lap("reference")
        if self._kl_in_reward and reference is not None and proximal is not None:
            kl = approx_kl(proximal, reference, estimator=loss.kl_estimator)
            penalty = (loss.kl_coefficient * kl).double().cpu().numpy()
        if advantages is None:
            credit = replace(
                batch.credit(plan.trained),
                values=None if values is None else values.double().cpu().numpy()[plan.trained],
                kl_penalty=None if penalty is None else penalty[plan.trained],
            )
            advantages = token_advantages(credit, self.config.advantage, self.estimator)
        tokens = step_tokens(batch, plan, advantages, step=step, device=self.policy.device)
        if proximal is not None:
            at = self._tensor(scored)
            importance = torch.zeros_like(proximal)
            importance[at] = self._importance(tokens.select(at), proximal[at])
        clock.lap("advantage")
        return replace(tokens, proximal=proximal, importance=importance, reference=reference, old_values=values)

    def accumulate(
        self, minibatch: Sequence[MicroBatch], tokens: TokenData, *, clock: Clock | None = None
    ) -> Diagnostics:
        """Runs forward and backward of this rank's micro-batches; gradients are added to the parameters' `grad`."""
        clock, total = clock or Clock(self.policy.device), Diagnostics()
        for micro_batch in minibatch:
            scores, gather = self._score_micro_batch(self.scorer, micro_batch)
            scored = self._with_scores(tokens.select(self._tensor(micro_batch.tokens)), scores, gather)
            loss, diagnostics = self.loss(scored)
            clock.lap("forward")
            loss.backward()
            clock.lap("backward")
            total += diagnostics
        return total

    def _rates(self, step: int) -> tuple[float, float]:
        """Learning rates of the policy and of the value head."""
        if self.config.check_drift:
            return 0.0, 0.0
        of_step = {"num_steps": self.config.num_steps, "config": self.config.optimizer}
        return learning_rate(step, **of_step), value_learning_rate(step, **of_step)

    def _update(self, diagnostics: Diagnostics, *, rate: float, value_rate: float, has_signal: bool) -> float:
        """Updates the weights; returns the gradient norm before clipping. Raises: DivergenceError.

        A minibatch without signal makes no update, whether its contexts were computed or not: AdamW would otherwise
        decay the weights, and move them by the momentum of earlier steps.
        """
        if not has_signal:
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.record(0.0)
            return 0.0
        norm = apply_update(
            self.scorer,
            self.optimizer,
            rate=rate,
            value_rate=value_rate,
            clip_norm=self.config.optimizer.clip_norm,
            loss_is_finite=self.world.all(math.isfinite(diagnostics.loss)),
        )
        self.guard.record(norm)
        return norm

    def _needs_prepass(self, plan: StepPlan) -> bool:
        return (
            len(plan.minibatches) > 1
            or needs_prepass(self.corrections)
            or self.estimator.needs_values
            or self._kl_in_reward
        )

    @property
    def _kl_in_reward(self) -> bool:
        return self.config.loss.kl_in == "reward" and self.reference is not None

    @torch.no_grad()
    def _score_batch(self, scorer: Scorer, batch: Batch, plan: StepPlan) -> tuple[Tensor, Tensor | None]:
        """(log-probs [N], values [N] or None), complete on all ranks; 0 for tokens that are not scored."""
        dtype = torch.promote_types(self.policy.model.dtype, torch.float32)
        logprobs, values = torch.zeros(2, len(batch.sampled), dtype=dtype, device=self.policy.device)
        for micro_batch in plan.prepass:
            scores, gather = self._score_micro_batch(scorer, micro_batch)
            index = self._tensor(micro_batch.tokens)
            logprobs[index] = scores.logprob[gather]
            if scores.value is not None:
                values[index] = scores.value[gather]
        return self.world.sum(logprobs), self.world.sum(values) if scorer.value_head is not None else None

    def _score_micro_batch(self, scorer: Scorer, micro_batch: MicroBatch) -> tuple[Scores, Tensor]:
        placement = micro_batch.placement
        scores = scorer(
            to_device(micro_batch.pack, self.policy.device),
            self._tensor(placement.source),
            self._tensor(placement.target),
            temperature=self.temperature,
            entropy_grad=self.config.loss.entropy_coefficient > 0,
        )
        return scores, self._tensor(placement.gather)

    def _with_scores(self, tokens: TokenData, scores: Scores, gather: Tensor) -> TokenData:
        """`tokens` of a micro-batch with the columns of the training forward pass."""
        logprobs = scores.logprob[gather]
        proximal, importance = tokens.proximal, tokens.importance
        if proximal is None or importance is None:
            proximal = logprobs.detach()
            importance = self._importance(tokens, proximal)
        return replace(
            tokens,
            logprobs=logprobs,
            entropy=scores.entropy[gather],
            values=None if scores.value is None else scores.value[gather],
            proximal=proximal,
            importance=importance,
        )

    def _importance(self, tokens: TokenData, proximal: Tensor) -> Tensor:
        return correction_weights(
            proximal,
            tokens.behavior,
            advantages=tokens.advantages,
            context=tokens.context,
            trajectory=tokens.trajectory,
            corrections=self.corrections,
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.policy.device)
