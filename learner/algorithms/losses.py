"""The loss of an optimizer step: the policy loss that `learner.loss.use` selects, and optional terms.

    sum over trained tokens t of  weight_t * ( w~_t * policy loss_t + kl_coefficient * KL_t
                                               - entropy_coefficient * entropy_t + value.coefficient * value loss_t )

All inputs are flat trained tokens [N]. Token losses are summed, never averaged: the weights contain the denominators,
which are counted over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from learner.algorithms.diagnostics import Diagnostics, diagnose
from learner.algorithms.importance_weights import scoped_log_ratio
from learner.algorithms.token_data import TokenData
from learner.algorithms.token_metrics import TokenTerms
from protocol.algorithm_config import CispoOptions, GspoOptions, LossConfig, PpoOptions
from protocol.config_base import Options
from protocol.extensions import ExtensionPoint


class PolicyLoss(ABC):
    """Base class of policy losses. `Options` declares their keys in the `[learner.loss]` section.

    is_zero_without_advantage   set it to true in a class whose loss and gradient are 0 for a token of advantage 0: then
                                contexts in which all advantages are 0 are not computed. A subclass must set it again
    """

    Options: ClassVar[type[BaseModel]] = Options
    is_zero_without_advantage: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def __call__(self, tokens: TokenData) -> tuple[Tensor, Tensor]:
        """(loss [N], clipped bool [N]) of N >= 0 trained tokens of whole contexts; the loss is minimized.

        The gradient flows through `tokens.log_ratio` or `tokens.logprobs`. Return the loss of each token, not weighted
        and not summed: the caller applies importance and aggregation weights and adds KL, entropy and value terms.
        `clipped`: whether clipping changes the token's objective; only metrics use it.
        """


class PPO(PolicyLoss):
    """PPO: the clipped surrogate of the token's ratio r = pi_theta / pi_prox."""

    Options = PpoOptions
    is_zero_without_advantage = True
    options: PpoOptions

    def __call__(self, tokens: TokenData) -> tuple[Tensor, Tensor]:
        o, log_ratio = self.options, self._log_ratio(tokens)
        return clipped_surrogate(
            log_ratio, tokens.advantages, clip_low=o.clip_low, clip_high=o.clip_high, dual_clip=o.dual_clip
        )

    def _log_ratio(self, tokens: TokenData) -> Tensor:
        return tokens.log_ratio


class GSPO(PPO):
    """GSPO: the clipped surrogate of the geometric mean of r over the token's context."""

    Options = GspoOptions
    is_zero_without_advantage = True

    def _log_ratio(self, tokens: TokenData) -> Tensor:
        return sequence_log_ratio(tokens.log_ratio, tokens.context)


class CISPO(PolicyLoss):
    """CISPO: log pi_theta is weighted by the clipped ratio, which has no gradient."""

    Options = CispoOptions
    is_zero_without_advantage = True
    options: CispoOptions

    def __call__(self, tokens: TokenData) -> tuple[Tensor, Tensor]:
        low, high = self.options.clip_low, self.options.clip_high
        return cispo(tokens.column("logprobs"), tokens.log_ratio, tokens.advantages, clip_low=low, clip_high=high)


POLICY_LOSSES = ExtensionPoint(
    key="learner.loss",
    noun="policy loss",
    builtins={
        "ppo": "learner.algorithms.losses:PPO",
        "gspo": "learner.algorithms.losses:GSPO",
        "cispo": "learner.algorithms.losses:CISPO",
    },
    methods={"__call__": "def __call__(self, tokens) -> (loss, clipped)"},
)


class Loss:
    """The loss that the `[learner.loss]` section configures. Raises (on creation): ConfigError."""

    def __init__(self, config: LossConfig, *, base_dir: Path | None = None) -> None:
        self.config = config
        self._policy_loss: PolicyLoss = POLICY_LOSSES.create(config, base_dir=base_dir)

    @property
    def is_zero_without_advantage(self) -> bool:
        """Whether a token of advantage 0 has loss and gradient 0, apart from the value loss.

        The policy loss's own class must declare it: a subclass of a class that declares it may add terms.
        """
        declared = vars(type(self._policy_loss)).get("is_zero_without_advantage", False)
        return bool(declared) and not (self.config.kl_coefficient or self.config.entropy_coefficient)

    def __call__(self, tokens: TokenData) -> tuple[Tensor, Diagnostics]:
        """(loss [], diagnostics) of N >= 0 trained tokens.

        KL, entropy and value terms are multiplied by the aggregation weight but not by w~: a correction applies only to
        the policy loss. Raises: ValueError if a column that the config needs is None; ExtensionError if an imported
        policy loss raises or returns wrong shapes.
        """
        config = self.config
        with POLICY_LOSSES.running(config.use):
            surrogate, clipped = self._policy_loss(tokens)
            _check_shapes(surrogate, clipped, num_tokens=len(tokens))
        per_token = tokens.column("importance") * surrogate
        kl = value = None
        if tokens.reference is not None:
            kl = approx_kl(tokens.column("logprobs"), tokens.reference, estimator=config.kl_estimator)
        if config.kl_coefficient and config.kl_in == "loss":
            if kl is None:
                raise ValueError(f"kl_coefficient = {config.kl_coefficient} needs reference [N], got None")
            per_token = per_token + config.kl_coefficient * kl
        if config.entropy_coefficient:
            per_token = per_token - config.entropy_coefficient * tokens.column("entropy")
        if tokens.values is not None:
            if tokens.old_values is None or tokens.returns is None:
                raise ValueError("values [N] need old_values [N] and returns [N], got None")
            value = value_loss(tokens.values, tokens.old_values, tokens.returns, clip=config.value.clip)
            per_token = per_token + config.value.coefficient * value
        loss = (tokens.weight * per_token).sum()
        return loss, diagnose(
            TokenTerms(
                tokens=tokens,
                loss=loss,
                clipped=clipped,
                kl_behavior=approx_kl(tokens.behavior, tokens.column("logprobs").detach()),
                kl_reference=kl,
                value_loss=value,
            )
        )


def _check_shapes(loss: Tensor, clipped: Tensor, *, num_tokens: int) -> None:
    if loss.shape != (num_tokens,) or clipped.shape != (num_tokens,):
        raise ValueError(
            f"a policy loss must return loss and clipped of shape [{num_tokens}], got {list(loss.shape)} and "
            f"{list(clipped.shape)}"
        )


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """(loss [N], clipped bool [N]): -min(r A, clip(r) A) with r = pi_theta / pi_prox; `clipped`: whether
    the clip changes the objective.

    With `dual_clip` c > 1 the loss of a token with A < 0 is at most c |A|.
    Source: Schulman et al. 2017 (PPO), equation 7; decoupled from the behaviour policy: Hilton et al. 2022, equation 5;
    asymmetric bounds: Yu et al. 2025 (DAPO), equation 10; dual clip: Ye et al. 2020 (MOBA games).
    """
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    objective = torch.minimum(unclipped, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective, objective != unclipped


def sequence_log_ratio(log_ratio: Tensor, context: Tensor) -> Tensor:
    """[N]: the value is the mean of `log_ratio` over the context's trained tokens; the gradient is the token's own.

    log s_(i,t) = sg(mean log r) + log r_t - sg(log r_t): its value is the log of the sequence's geometric mean ratio.
    Source: Zheng et al. 2025 (GSPO), equations 7 and 14 (GSPO-token). Here the sequence is a context, because
    the contexts of a trajectory may be in several micro-batches.
    """
    fixed = log_ratio.detach()
    return scoped_log_ratio(fixed, context) + (log_ratio - fixed)


def cispo(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(loss [N], clipped bool [N]): -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi_theta.

    Only the weight is clipped, so every token keeps its gradient.
    Source: MiniMax 2025 (MiniMax-M1, CISPO), equations 4 and 5.
    """
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -bounded * advantages * logprobs, bounded != ratio


def approx_kl(logprobs: Tensor, other: Tensor, *, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """[N]: per-token estimates of KL(p || q) from tokens sampled by p (`logprobs`); q is `other`.

    k1 = log p - log q (unbiased); k2 = k1^2 / 2 (biased, never negative); k3 = q/p - 1 - log q/p (unbiased and never
    negative). Raises: ValueError for another estimator.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = other - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return log_ratio.expm1() - log_ratio
    raise ValueError(f"the KL estimator must be one of k1, k2, k3, got {estimator!r}")


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = None) -> Tensor:
    """[N]: (V - R)^2 / 2; with `clip`, the larger of this and the same with V clipped to [V_old - clip, V_old + clip].

    Source: Schulman et al. 2017 (PPO), equation 9; the clip: Dhariwal et al. 2017 (PPO2 of OpenAI Baselines).
    """
    errors = (values - returns).square()
    if clip is not None:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (bounded - returns).square())
    return errors / 2
