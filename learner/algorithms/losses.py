"""The loss of an optimiser step: a policy loss by name, and what may be added to it.

    sum over trained tokens t of weight_t * ( w~_t * policy loss_t  +  KL to a reference  -  entropy  +  value loss )

Everything is over flat trained tokens [N]; sums, never means: the weights hold the denominators, which are global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learner.algorithms.diagnostics import Diagnostics, diagnose
from learner.algorithms.importance_weights import scoped_log_ratio
from learner.algorithms.token_metrics import TokenTerms
from protocol.algorithm_config import LossConfig


@dataclass(frozen=True, slots=True, eq=False)
class LossTokens:
    """N trained tokens of one micro-batch, which holds whole contexts. Float columns [N] unless they say otherwise.

    logprobs, entropy, values          under pi_theta; they carry gradient (entropy only where there is a bonus)
    proximal, behavior, reference      log-probs under pi_prox, pi_behave and the reference policy
    importance                         w~, of `correction_weights`
    advantages, returns, old_values    returns and the values at the start of the step are those of `gae`
    weight                             of the aggregation
    context, age, turn                 int64 [N]: the token's context, its age in versions, its context's index
    """

    logprobs: Tensor
    entropy: Tensor
    proximal: Tensor
    behavior: Tensor
    importance: Tensor
    advantages: Tensor
    weight: Tensor
    context: Tensor
    age: Tensor
    turn: Tensor
    reference: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


def total_loss(tokens: LossTokens, config: LossConfig) -> tuple[Tensor, Diagnostics]:
    """(loss [], diagnostics) of N >= 0 trained tokens.

    KL, entropy and value terms are weighted as the policy loss is, but not by w~: a correction drops what a token says
    about the advantage, not its place near the reference. Raises: ValueError where a column that the config needs is
    None.
    """
    surrogate, clipped = _policy_loss(tokens, config)
    per_token = tokens.importance * surrogate
    kl = value = None
    if tokens.reference is not None:
        kl = approx_kl(tokens.logprobs, tokens.reference, estimator=config.kl_estimator)
    if config.kl_coefficient and config.kl_in == "loss":
        if kl is None:
            raise ValueError(f"kl_coefficient = {config.kl_coefficient} needs reference [N], got None")
        per_token = per_token + config.kl_coefficient * kl
    if config.entropy_coefficient:
        per_token = per_token - config.entropy_coefficient * tokens.entropy
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
            kl_behavior=approx_kl(tokens.behavior, tokens.logprobs.detach()),
            kl_reference=kl,
            value_loss=value,
        )
    )


def _policy_loss(tokens: LossTokens, config: LossConfig) -> tuple[Tensor, Tensor]:
    log_ratio = tokens.logprobs - tokens.proximal
    low, high = config.clip_low, config.clip_high
    if config.policy_loss == "cispo":
        return cispo(tokens.logprobs, log_ratio, tokens.advantages, clip_low=low, clip_high=high)
    if config.policy_loss == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, tokens.context)
    return clipped_surrogate(log_ratio, tokens.advantages, clip_low=low, clip_high=high, dual_clip=config.dual_clip)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """(loss [N], clipped bool [N]): -min(r A, clip(r) A) with r = pi_theta / pi_prox, and where a clip is binding.

    With `dual_clip` c > 1 the loss of a token with A < 0 is at most c |A|.
    Source: Schulman et al. 2017 (PPO), equation 7; decoupled from the behaviour policy: Hilton et al. 2022, equation 5;
    asymmetric bounds: Yu et al. 2025 (DAPO), equation 10; dual clip: Ye et al. 2020 (MOBA games).
    """
    ratio = log_ratio.exp()
    free = ratio * advantages
    objective = torch.minimum(free, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective, objective != free


def sequence_log_ratio(log_ratio: Tensor, context: Tensor) -> Tensor:
    """[N]: the mean of `log_ratio` over the trained tokens of a context, with the gradient of the token's own.

    log s_(i,t) = sg(mean log r) + log r_t - sg(log r_t): its value is the log of the sequence's geometric mean ratio.
    Source: Zheng et al. 2025 (GSPO), equations 7 and 14 (GSPO-token); the sequence is a context, not a trajectory,
    whose contexts may lie in several micro-batches.
    """
    fixed = log_ratio.detach()
    return scoped_log_ratio(fixed, context) + (log_ratio - fixed)


def cispo(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(loss [N], clipped bool [N]): -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi_theta.

    What is clipped is the weight: no token loses its gradient.

    Source: MiniMax 2025 (MiniMax-M1, CISPO), equations 4 and 5.
    """
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -bounded * advantages * logprobs, bounded != ratio


def approx_kl(logprobs: Tensor, other: Tensor, *, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """[N]: per-token estimates of KL(p || q) from tokens sampled by p (`logprobs`), q being `other`.

    k1 = log p - log q (unbiased); k2 = k1^2 / 2 (biased, never negative); k3 = q/p - 1 - log q/p (both virtues).
    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = other - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.expm1() - log_ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = None) -> Tensor:
    """[N]: (V - R)^2 / 2; with `clip` the larger of that and the same with V kept within `clip` of V_old.

    Source: Schulman et al. 2017 (PPO), equation 9; the clip: Dhariwal et al. 2017 (PPO2 of OpenAI Baselines).
    """
    errors = (values - returns).square()
    if clip is not None:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (bounded - returns).square())
    return errors / 2
