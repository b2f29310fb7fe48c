"""From groups to micro-batches, in pure NumPy: which tokens are trained, with what weight, beside which others.

    groups ──flatten──► Batch: one row a sampled token [N]
                          │  split by trajectory, in lease order
                          ▼
                        Minibatch: weights from *all* its sampled tokens, then the age mask
                          │  contexts sorted by length, filled to a budget of padded tokens
                          ▼
                        MicroBatch: contexts right-padded [R, T], trained tokens flat [N]

Losses are formed on the flat tokens and never on rows: the weight of a token is fixed before it is known which
micro-batch will compute it, so that any split, order or packing gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protocol.errors import MalformedMessage
from protocol.types import Context, Status, TrajectoryGroup

Aggregation = Literal["trajectory", "context", "token", "constant"]
Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """N tokens that the policy sampled, ordered by trajectory, context and position.

    trajectory, context  int64   [N]  index within the batch
    position             int64   [N]  within the context, >= 1
    token_id             int64   [N]
    behavior_logprob     float32 [N]
    version              int32   [N]
    advantage            float32 [N]
    """

    trajectory: Index
    context: Index
    position: Index
    token_id: Index
    behavior_logprob: NDArray[np.float32]
    version: NDArray[np.int32]
    advantage: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.token_id)

    def select(self, which: NDArray[np.bool_] | Index | slice) -> SampledTokens:
        """The tokens that a mask [N], indices or a slice name."""
        return SampledTokens(*(getattr(self, column.name)[which] for column in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """C contexts of the non-failed trajectories of a batch; those of `token_ids` [starts[c], starts[c+1]) are c's.

    token_ids  int32 [sum of lengths]
    starts     int64 [C + 1]
    """

    token_ids: NDArray[np.int32]
    starts: Index
    num_trajectories: int
    sampled: SampledTokens

    @property
    def num_contexts(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """R contexts that go through the model together.

    token_ids  int64   [R, T]  right-padded with 0, each cut before its last trained token, which is never an input
    row        int64   [N]     the row of each trained token
    tokens             [N]     the trained tokens
    weight     float32 [N]     what multiplies a token's loss; the loss is the plain sum over all micro-batches
    num_input_tokens           sum of lengths without padding
    """

    token_ids: Index
    row: Index
    tokens: SampledTokens
    weight: NDArray[np.float32]
    num_input_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """What one optimiser step sees. `num_over_age`: sampled tokens that are too old, masked but counted in weights."""

    micro_batches: tuple[MicroBatch, ...]
    num_sampled: int
    num_over_age: int


def flatten(
    groups: Sequence[TrajectoryGroup],
    advantages: Sequence[ArrayLike],
    *,
    last_context_only: bool = False,
) -> Batch:
    """Columns of every sampled token of a batch. `advantages`: [G] for each group.

    Failed trajectories are left out. `last_context_only` (an ablation) treats all but the last context of a trajectory
    as not sampled. Raises: MalformedMessage where a context samples its first token, which no forward can score, or
    where its version spans do not cover its sampled tokens.
    """
    contexts: list[Context] = []
    owner: list[int] = []
    advantage: list[float] = []
    for group, values in zip(groups, advantages, strict=True):
        for trajectory, value in zip(group.trajectories, np.asarray(values, dtype=np.float64), strict=True):
            if trajectory.status is Status.FAILED:
                continue
            kept = trajectory.contexts[-1:] if last_context_only else trajectory.contexts
            contexts.extend(kept)
            owner.extend([len(advantage)] * len(kept))
            advantage.append(float(value))

    lengths = np.array([len(context) for context in contexts], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    token_ids = _concatenate([context.token_ids for context in contexts], np.int32)
    at = np.flatnonzero(_concatenate([context.loss_mask for context in contexts], np.bool_))
    context_of = np.repeat(np.arange(len(contexts)), lengths)[at]
    trajectory_of = np.array(owner, dtype=np.int64)[context_of]
    sampled = SampledTokens(
        trajectory=trajectory_of,
        context=context_of,
        position=at - starts[context_of],
        token_id=token_ids[at].astype(np.int64),
        behavior_logprob=_concatenate([context.behavior_logprobs for context in contexts], np.float32)[at],
        version=_versions(contexts, num_sampled=len(at)),
        advantage=np.array(advantage, dtype=np.float32)[trajectory_of],
    )
    if len(sampled) and int(sampled.position.min()) < 1:
        raise MalformedMessage("context: its first token has no predecessor, so loss_mask[0] must be false, got true")
    return Batch(token_ids=token_ids, starts=starts, num_trajectories=len(advantage), sampled=sampled)


def aggregation_weights(
    trajectory: Index, context: Index, *, aggregation: Aggregation, constant: float = 1.0
) -> NDArray[np.float64]:
    """float64 [N]: the weight of each sampled token in the loss, before any age or ratio mask.

    trajectory, context: int [N], the owners of *every* sampled token of the optimiser step, over all ranks.
    With n_x the number of sampled tokens in x: `token` 1/N; `context` 1/(C n_c); `trajectory` 1/(T n_i);
    `constant` 1/(T constant). C and T count contexts and trajectories with at least one sampled token.
    Sources: DAPO (token), GRPO (trajectory), Dr. GRPO (constant).
    """
    num_tokens = len(trajectory)
    if num_tokens == 0:
        return np.zeros(0)
    if aggregation == "token":
        return np.full(num_tokens, 1.0 / num_tokens)
    per_trajectory = np.bincount(trajectory)
    num_trajectories = np.count_nonzero(per_trajectory)
    if aggregation == "constant":
        return np.full(num_tokens, 1.0 / (num_trajectories * constant))
    if aggregation == "trajectory":
        return 1.0 / (num_trajectories * per_trajectory[trajectory])
    per_context = np.bincount(context)
    return 1.0 / (np.count_nonzero(per_context) * per_context[context])


def make_minibatches(
    batch: Batch,
    *,
    num_minibatches: int,
    tokens_per_micro_batch: int,
    aggregation: Aggregation,
    constant: float,
    oldest_version: int,
    newest_version: int,
) -> list[Minibatch]:
    """Splits a batch by trajectory into `num_minibatches` (fewer where trajectories are fewer), in lease order.

    Tokens of a version below `oldest_version` (the learner's step minus the staleness bound) are not trained, but keep
    their part of the denominator. The denominator is that of the optimiser step: a minibatch, over all ranks.
    Raises: MalformedMessage where a version is above `newest_version`, the learner's step.
    """
    newest = int(batch.sampled.version.max(initial=newest_version))
    if newest > newest_version:
        raise MalformedMessage(f"batch: policy versions must be <= the learner's step {newest_version}, got {newest}")
    parts = np.array_split(np.arange(batch.num_trajectories), max(1, min(num_minibatches, batch.num_trajectories)))
    minibatches = []
    for part in parts:
        tokens = batch.sampled.select(np.isin(batch.sampled.trajectory, part))
        weight = aggregation_weights(tokens.trajectory, tokens.context, aggregation=aggregation, constant=constant)
        young = tokens.version >= oldest_version
        micro_batches = make_micro_batches(
            batch,
            tokens=tokens.select(young),
            weight=weight[young].astype(np.float32),
            tokens_per_micro_batch=tokens_per_micro_batch,
        )
        minibatches.append(
            Minibatch(
                micro_batches=tuple(micro_batches),
                num_sampled=len(tokens),
                num_over_age=len(tokens) - int(np.count_nonzero(young)),
            )
        )
    return minibatches


def make_micro_batches(
    batch: Batch, *, tokens: SampledTokens, weight: NDArray[np.float32], tokens_per_micro_batch: int
) -> list[MicroBatch]:
    """Fills micro-batches of at most `tokens_per_micro_batch` padded tokens (one context at least), longest first.

    Contexts without a trained token are not computed at all.
    """
    contexts, first = np.unique(tokens.context, return_index=True)
    ends = np.append(first[1:], len(tokens))
    lengths = tokens.position[ends - 1] if len(contexts) else np.zeros(0, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    micro_batches = []
    for chosen in _fill(order, lengths, tokens_per_micro_batch):
        counts = (ends - first)[chosen]
        flat = np.repeat(first[chosen] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        micro_batches.append(
            MicroBatch(
                token_ids=_padded(batch, contexts[chosen], lengths[chosen]),
                row=np.repeat(np.arange(len(chosen)), counts),
                tokens=tokens.select(flat),
                weight=weight[flat],
                num_input_tokens=int(lengths[chosen].sum()),
            )
        )
    return micro_batches


def _fill(order: Index, lengths: Index, budget: int) -> list[Index]:
    """Cuts `order` (by descending length) where the next row would pass the budget of rows x longest."""
    parts = []
    start = 0
    while start < len(order):
        num_rows = max(1, budget // max(1, int(lengths[order[start]])))
        parts.append(order[start : start + num_rows])
        start += num_rows
    return parts


def _padded(batch: Batch, contexts: Index, lengths: Index) -> Index:
    columns = np.arange(int(lengths.max()))
    inside = columns < lengths[:, None]
    source = np.where(inside, batch.starts[contexts][:, None] + columns, 0)
    return np.where(inside, batch.token_ids[source], 0).astype(np.int64)


def _versions(contexts: Sequence[Context], *, num_sampled: int) -> NDArray[np.int32]:
    """int32 [N]: spans cover exactly the sampled positions in ascending order, so that repeating them is enough."""
    spans = [span for context in contexts for span in context.policy_versions]
    versions = np.repeat(
        np.array([span.version for span in spans], dtype=np.int32),
        np.array([span.end - span.start for span in spans], dtype=np.int64),
    )
    if len(versions) != num_sampled:
        raise MalformedMessage(f"batch: version spans must cover {num_sampled} sampled tokens, got {len(versions)}")
    return versions


def _concatenate(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype=dtype)
