"""DESIGN.md's "Multi-context GRPO, exactly", token by token in slow NumPy: the judge of the fast path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from protocol.config import LearnerConfig, LossConfig
from protocol.types import Context, Status, Trajectory, TrajectoryGroup

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
) -> Reference:
    sampled = list(tokens_of(trajectories))
    trained = [token for token in sampled if token.version >= step - config.staleness_bound]
    cache_current = {id(t.source): current(t.source) for t in trained}
    cache_proximal = {id(t.source): proximal(t.source) for t in trained}
    loss = 0.0
    slopes = []
    for token in trained:
        logp, prox = (c[id(token.source)][token.position] for c in (cache_current, cache_proximal))
        factor = weight_of(token, sampled, config.loss) * correction_of(token, trained, cache_proximal, config.loss)

        def term(x: float, *, factor: float = factor, prox: float = prox, advantage: float = token.advantage) -> float:
            r = np.exp(x - prox)
            clipped = np.clip(r, 1 - config.loss.clip_low, 1 + config.loss.clip_high)
            return float(-factor * min(r * advantage, clipped * advantage))

        h = 1e-5
        loss += term(logp)
        slopes.append((token, (term(logp + h) - term(logp - h)) / (2 * h)))
    return Reference(loss, slopes)


def weight_of(token: Token, sampled: Sequence[Token], config: LossConfig) -> float:
    if config.aggregation == "token":
        return 1 / len(sampled)
    num_trajectories = len({t.trajectory for t in sampled})
    if config.aggregation == "constant":
        return 1 / (num_trajectories * config.constant)
    if config.aggregation == "trajectory":
        return 1 / num_trajectories / sum(t.trajectory == token.trajectory for t in sampled)
    return 1 / len({t.context for t in sampled}) / sum(t.context == token.context for t in sampled)


def correction_of(
    token: Token, trained: Sequence[Token], proximal: dict[int, NDArray[np.float64]], config: LossConfig
) -> float:
    kind, scope, low, high = (getattr(config.correction, name) for name in ("kind", "scope", "low", "high"))
    if kind == "none":
        return 1.0
    fellows = {
        "token": [token],
        "context": [t for t in trained if t.context == token.context],
        "trajectory": [t for t in trained if t.trajectory == token.trajectory],
    }[scope]
    ratios = [np.exp(proximal[id(t.source)][t.position] - t.behavior) for t in fellows]
    w = float(np.prod(ratios) ** (1 / len(ratios)))
    if kind == "truncate":
        return min(w, high)
    return w if low <= w <= high else 0.0


def full_logprobs(model: PreTrainedModel, context: Context, *, temperature: float) -> torch.Tensor:
    """[L] with gradient: a plain transformers forward of one context, no padding, logits everywhere; [0] is 0."""
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
    """The log-probs of the model, remembered: those of `contexts` as it is now, others when first asked for."""
    known: dict[int, NDArray[np.float64]] = {}

    @torch.no_grad()
    def of(context: Context) -> NDArray[np.float64]:
        if id(context) not in known:
            known[id(context)] = full_logprobs(model, context, temperature=temperature).double().numpy()
        return known[id(context)]

    for context in contexts:
        of(context)
    return of
