"""The equations of docs/algorithms.md, token by token in slow NumPy; the learner is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from learner.algorithms.advantages import Credit
from protocol.algorithm_config import AdvantageConfig, CorrectionConfig, LossConfig
from protocol.learner_config import LearnerConfig
from protocol.types import Context, Status, Trajectory, TrajectoryGroup
from tests.learner.configs import advantage_options, correction_options, loss_options

LogprobsOf = Callable[[Context], NDArray[np.float64]]
"""float64 [L]: log-probability of each token of a context given those before it."""


@dataclass(frozen=True)
class Token:
    trajectory: int
    context: int
    position: int
    advantage: float
    behavior: float
    version: int
    source: Context


@dataclass(frozen=True)
class Reference:
    """The loss, and d loss / d log-prob of each trained token."""

    loss: float
    slopes: list[tuple[Token, float]]


def reference_advantages(group: TrajectoryGroup, *, ddof: int = 1, eps: float = 1e-6) -> list[float]:
    rewards = [t.reward for t in group.trajectories if t.status is not Status.FAILED]
    if len(rewards) < 2:
        return [0.0] * len(group.trajectories)
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof)) ** 0.5
    return [0.0 if t.status is Status.FAILED else (t.reward - mean) / (std + eps) for t in group.trajectories]


def trajectories_of(groups: Sequence[TrajectoryGroup]) -> list[tuple[Trajectory, float]]:
    return [
        (trajectory, advantage)
        for group in groups
        for trajectory, advantage in zip(group.trajectories, reference_advantages(group), strict=True)
        if trajectory.status is not Status.FAILED
    ]


def tokens_of(trajectories: Sequence[tuple[Trajectory, float]]) -> Iterator[Token]:
    number = 0
    for i, (trajectory, advantage) in enumerate(trajectories):
        for context in trajectory.contexts:
            for span in context.policy_versions:
                for t in range(span.start, span.end):
                    behavior = float(context.behavior_logprobs[t])
                    yield Token(i, number, t, advantage, behavior, span.version, context)
            number += 1


def reference_loss(
    trajectories: Sequence[tuple[Trajectory, float]],
    *,
    step: int,
    current: LogprobsOf,
    proximal: LogprobsOf,
    config: LearnerConfig,
    reference: LogprobsOf | None = None,
) -> Reference:
    sampled = list(tokens_of(trajectories))
    trained = [token for token in sampled if token.version >= step - config.staleness_bound]
    logps, proxs = ([of(t.source)[t.position] for t in trained] for of in (current, proximal))
    refs = [reference(t.source)[t.position] for t in trained] if reference else None
    weights = [weight_of(token, sampled, config.loss) for token in trained]
    corrections = reference_corrections(trained, proxs, config.loss.corrections)
    loss, slopes = reference_objective(trained, logps, proxs, refs, weights, corrections, config.loss)
    return Reference(loss, list(zip(trained, slopes, strict=True)))


def reference_objective(
    trained: Sequence[Token],
    logps: Sequence[float],
    proxs: Sequence[float],
    refs: Sequence[float] | None,
    weights: Sequence[float],
    corrections: Sequence[float],
    config: LossConfig,
) -> tuple[float, list[float]]:
    """(loss, d loss / d log-prob of each token), by central differences with everything under sg() fixed."""
    options = loss_options(config)
    loss, slopes = 0.0, []
    for n, token in enumerate(trained):
        peers = [m for m, other in enumerate(trained) if other.context == token.context]
        mean = sum(logps[m] - proxs[m] for m in peers) / len(peers)

        def term(x: float, *, n: int = n, mean: float = mean, a: float = token.advantage) -> float:
            now = {"ppo": x - proxs[n], "gspo": mean + x - logps[n], "cispo": logps[n] - proxs[n]}[config.use]
            r = np.exp(now)
            clipped = min(max(r, 1 - options.clip_low), 1 + options.clip_high)
            if config.use == "cispo":
                policy = -clipped * a * x
            else:
                policy = -min(r * a, clipped * a)
                if options.dual_clip and a < 0:
                    policy = min(policy, -options.dual_clip * a)
            kl = 0.0
            if refs is not None and config.kl_in == "loss":
                d = refs[n] - x
                kl = {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - 1 - d}[config.kl_estimator]
            return float(weights[n] * (corrections[n] * policy + config.kl_coefficient * kl))

        h = 1e-5
        loss += term(logps[n])
        slopes.append((term(logps[n] + h) - term(logps[n] - h)) / (2 * h))
    return loss, slopes


def weight_of(token: Token, sampled: Sequence[Token], config: LossConfig) -> float:
    if config.aggregation == "token":
        return 1 / len(sampled)
    num_trajectories = len({t.trajectory for t in sampled})
    if config.aggregation == "constant":
        return 1 / (num_trajectories * config.constant)
    if config.aggregation == "trajectory":
        return 1 / num_trajectories / sum(t.trajectory == token.trajectory for t in sampled)
    return 1 / len({t.context for t in sampled}) / sum(t.context == token.context for t in sampled)


def reference_corrections(
    trained: Sequence[Token], proxs: Sequence[float], corrections: Sequence[CorrectionConfig]
) -> list[float]:
    return [
        float(np.prod([correction_of(n, trained, proxs, each) for each in corrections])) for n in range(len(trained))
    ]


def correction_of(n: int, trained: Sequence[Token], proxs: Sequence[float], config: CorrectionConfig) -> float:
    token, kind, correction = trained[n], config.use, correction_options(config)
    if kind == "second_moment":
        squares = sorted((p - t.behavior) ** 2 for t, p in zip(trained, proxs, strict=True))
        while squares and sum(squares) / len(squares) > correction.threshold:
            largest = squares[-1]
            squares = [square for square in squares if square != largest]
        return float(bool(squares) and (proxs[n] - token.behavior) ** 2 <= squares[-1])
    peers = {
        "token": [n],
        "context": [m for m, t in enumerate(trained) if t.context == token.context],
        "trajectory": [m for m, t in enumerate(trained) if t.trajectory == token.trajectory],
    }[correction.scope]
    ratios = [float(np.exp(proxs[m] - trained[m].behavior)) for m in peers]
    if kind == "reject_negative":
        distance = -sum(np.log(ratio) for ratio in ratios) / len(ratios)
        return float(not (token.advantage < 0 and distance > correction.threshold))
    if kind == "reject" and correction.ratio == "worst":
        return float(all(correction.low <= ratio <= correction.high for ratio in ratios))
    w = float(np.prod(ratios)) if correction.ratio == "product" else float(np.prod(ratios) ** (1 / len(ratios)))
    if kind == "truncate":
        return min(w, correction.high)
    within = correction.low <= w <= correction.high
    return float(within) if kind == "reject" else w * within


def full_logprobs(model: PreTrainedModel, context: Context, *, temperature: float) -> torch.Tensor:
    """[L] with gradient: a plain transformers forward of one context, no padding, all logits; [0] is 0."""
    ids = torch.from_numpy(context.token_ids.astype(np.int64))[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0] / temperature
    logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    return torch.cat([logprobs.new_zeros(1), logprobs])


def accumulate_reference(model: PreTrainedModel, reference: Reference, *, temperature: float) -> None:
    """Adds the gradient of the reference loss to the model's, context by context."""
    by_context: dict[int, list[tuple[Token, float]]] = {}
    for token, slope in reference.slopes:
        by_context.setdefault(id(token.source), []).append((token, slope))
    for pairs in by_context.values():
        logprobs = full_logprobs(model, pairs[0][0].source, temperature=temperature)
        torch.stack([logprobs[token.position] * slope for token, slope in pairs]).sum().backward()


def frozen(model: PreTrainedModel, *, temperature: float, contexts: Sequence[Context] = ()) -> LogprobsOf:
    """Returns a cache of the model's log-probs: `contexts` are computed now, others at their first use."""
    known: dict[int, NDArray[np.float64]] = {}

    @torch.no_grad()
    def of(context: Context) -> NDArray[np.float64]:
        if id(context) not in known:
            known[id(context)] = full_logprobs(model, context, temperature=temperature).double().numpy()
        return known[id(context)]

    for context in contexts:
        of(context)
    return of


def reference_token_advantages(
    credit: Credit,
    config: AdvantageConfig,
    *,
    values: Sequence[float] | None = None,
    penalty: Sequence[float] | None = None,
) -> tuple[list[float], list[float] | None]:
    """Returns (advantages, returns), computed one token at a time."""
    options = advantage_options(config)
    num_tokens = len(credit.trajectory)
    penalty = penalty if penalty is not None else [0.0] * num_tokens
    tokens = list(zip(credit.trajectory.tolist(), credit.context.tolist(), credit.policy.tolist(), strict=True))
    with_contexts = config.context_rewards == "add"
    returns: list[float] | None = None
    advantages = []
    if config.use in ("gae", "reinforce_pp"):
        rewards = [-float(p) for p in penalty]
        for n, (i, k, policy) in enumerate(tokens):
            if not any((i, policy) == (j, other) for j, _, other in tokens[n + 1 :]):
                rewards[n] += float(credit.reward[i])
            if with_contexts and all(k != c for _, c, _ in tokens[n + 1 :]):
                assert credit.context_reward is not None
                rewards[n] += float(credit.context_reward[k])
        returns = [0.0] * num_tokens
        advantages = [0.0] * num_tokens
        for n in reversed(range(num_tokens)):
            i, _, policy = tokens[n]
            later = [m for m in range(n + 1, num_tokens) if (tokens[m][0], tokens[m][2]) == (i, policy)]
            if config.use == "reinforce_pp":
                advantages[n] = rewards[n] + (options.gamma * advantages[later[0]] if later else 0.0)
                continue
            assert values is not None
            delta = rewards[n] + (options.gamma * values[later[0]] if later else 0.0) - values[n]
            advantages[n] = delta + (options.gamma * options.lam * advantages[later[0]] if later else 0.0)
            returns[n] = advantages[n] + values[n]
        if options.whiten and num_tokens > 1:
            mean = sum(advantages) / num_tokens
            std = (sum((a - mean) ** 2 for a in advantages) / (num_tokens - 1)) ** 0.5
            advantages = [(a - mean) / (std + options.eps) for a in advantages]
    else:
        scores = [
            float(reward) - sum(p for p, token in zip(penalty, tokens, strict=True) if token[0] == i)
            for i, reward in enumerate(credit.reward)
        ]
        for i, k, _ in tokens:
            peers = [j for j in range(len(scores)) if credit.group[j] == credit.group[i]]
            advantage = reference_estimate(scores[i], [scores[j] for j in peers], config)
            if with_contexts:
                assert credit.context_reward is not None
                like = [c for c in range(len(credit.owner)) if anchor_of(credit, c) == anchor_of(credit, k)]
                alike = [float(credit.context_reward[c]) for c in like]
                advantage += reference_estimate(float(credit.context_reward[k]), alike, config)
            advantages.append(advantage)
    weights = [config.role_weights.get(credit.roles[credit.role[k]], 1.0) for _, k, _ in tokens]
    weighted = [a * w for a, w in zip(advantages, weights, strict=True)]
    return weighted, returns if config.use == "gae" else None


def anchor_of(credit: Credit, context: int) -> tuple[int, int, int]:
    return int(credit.group[credit.owner[context]]), int(credit.role[context]), int(credit.turn[context])


def reference_estimate(reward: float, rewards: Sequence[float], config: AdvantageConfig) -> float:
    """The advantage of `reward` in its group `rewards`, which includes it."""
    if len(rewards) < 2 or len(set(rewards)) == 1:
        return 0.0
    options = advantage_options(config)
    mean = sum(rewards) / len(rewards)
    if config.use == "rloo":
        return reward - (sum(rewards) - reward) / (len(rewards) - 1)
    if config.use == "maxrl":
        return (reward - mean) / (mean + options.eps) if mean > 0 else 0.0
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - options.ddof)) ** 0.5
    return (reward - mean) / (std + options.eps) if options.normalize_std else reward - mean
