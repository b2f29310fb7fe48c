"""Splits a batch into minibatches and micro-batches, and computes the tokens' weights and the age mask.

    Batch ──► minibatches, split by trajectory in lease order (one optimizer step each)
                │  weights over *all* sampled tokens of the minibatch, on all ranks; then the age mask, and the
                │  tokens that need no computation (selection.py)
                ▼
              micro-batches of contexts with common prefixes, the same number on every rank (packing.py)

Every rank computes the same plan for all ranks and keeps its own micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.algorithms.advantages import Advantages
from learner.batch.flatten import Aggregation, Batch, Index, aggregation_weights
from learner.batch.packing import Pack, Placement, Share, pack, split
from learner.batch.selection import Bools, Selection, everything
from protocol.errors import MalformedMessage


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Contexts that go through the model as one packed row.

    tokens     int64 [n]  the trained tokens, as indices into the batch's sampled tokens
    placement             the places in the row at which these n tokens are scored
    """

    pack: Pack
    placement: Placement
    tokens: Index
    num_contexts: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The plan of one training step for the N sampled tokens of its batch.

    weight       float32 [N]  factor of a token's loss; a minibatch's loss is the sum over its micro-batches and ranks
    trained      bool    [N]  false if a token is over age: it is not trained, but counts in the denominator
    selection                 which of the trained tokens go through the model
    minibatches               this rank's micro-batches of each minibatch (optimizer step)
    prepass                   this rank's micro-batches of forward passes without gradient
    advantages                of the trained tokens; None if they are known only after a forward pass
    has_signal                for each minibatch, on all ranks: false if its gradient is 0, so that it makes no update
    """

    weight: NDArray[np.float32]
    trained: Bools
    selection: Selection
    minibatches: tuple[tuple[MicroBatch, ...], ...]
    prepass: tuple[MicroBatch, ...]
    has_signal: tuple[bool, ...]
    advantages: Advantages | None = None

    @property
    def num_over_age(self) -> int:
        return int(np.count_nonzero(~self.trained))


def trained_tokens(batch: Batch, *, oldest_version: int, newest_version: int) -> Bools:
    """bool [N]: false for the sampled tokens of a version below `oldest_version`.

    oldest_version: the learner's step minus the staleness bound; newest_version: the learner's step.
    Raises: MalformedMessage if a version is above `newest_version`.
    """
    newest = int(batch.sampled.version.max(initial=newest_version))
    if newest > newest_version:
        raise MalformedMessage(f"batch: policy versions must be <= the learner's step {newest_version}, got {newest}")
    return batch.sampled.version >= oldest_version


def make_plan(
    batch: Batch,
    *,
    num_minibatches: int,
    tokens_per_micro_batch: int,
    aggregation: Aggregation,
    constant: float,
    oldest_version: int,
    newest_version: int,
    selection: Selection | None = None,
    share: Share = "auto",
    rank: int = 0,
    num_ranks: int = 1,
) -> StepPlan:
    """Splits a batch by trajectory, in lease order, into `num_minibatches`, or fewer if there are fewer trajectories.

    The denominators of `aggregation` are counted over one minibatch (one optimizer step) on all ranks, not over the
    whole batch. Tokens that are not trained (see `trained_tokens`) or not selected count in the denominators. A
    minibatch without selected tokens has no micro-batches; without `selection`, every trained token is selected.
    Raises: MalformedMessage if a version is above `newest_version`.
    """
    sampled = batch.sampled
    trained = trained_tokens(batch, oldest_version=oldest_version, newest_version=newest_version)
    chosen = selection or everything(trained)

    def micro_batches(tokens: Bools) -> tuple[MicroBatch, ...]:
        return tuple(
            make_micro_batches(
                batch,
                tokens=np.flatnonzero(tokens),
                tokens_per_micro_batch=tokens_per_micro_batch,
                share=share,
                rank=rank,
                num_ranks=num_ranks,
            )
        )

    weight = np.zeros(len(sampled), dtype=np.float32)
    minibatches, has_signal = [], []
    for part in np.array_split(np.arange(batch.num_trajectories), max(1, min(num_minibatches, batch.num_trajectories))):
        inside = np.isin(sampled.trajectory, part)
        weight[inside] = aggregation_weights(
            sampled.trajectory[inside], sampled.context[inside], aggregation=aggregation, constant=constant
        )
        minibatches.append(micro_batches(inside & chosen.computed))
        has_signal.append(bool((inside & chosen.signal).any()))
    # Packs of the training pass are scored as they are: another packing would round pi_theta / pi_prox away from 1.
    prepass = (
        *(each for minibatch in minibatches for each in minibatch),
        *micro_batches(chosen.scored & ~chosen.computed),
    )
    return StepPlan(
        weight=weight,
        trained=trained,
        selection=chosen,
        minibatches=tuple(minibatches),
        prepass=prepass,
        has_signal=tuple(has_signal),
    )


def make_micro_batches(
    batch: Batch,
    *,
    tokens: Index,
    tokens_per_micro_batch: int,
    share: Share = "auto",
    rank: int = 0,
    num_ranks: int = 1,
) -> list[MicroBatch]:
    """One rank's micro-batches for training `tokens`, ascending indices into the batch's sampled tokens.

    A micro-batch has at most `tokens_per_micro_batch` unique tokens, or a single longer context. The input of a
    context ends before its last trained token, which is only a target; contexts without trained tokens are left out.
    """
    owner = batch.sampled.context[tokens]
    contexts, first = np.unique(owner, return_index=True)
    ends = np.append(first[1:], len(tokens)).astype(np.int64)
    last = batch.sampled.position[tokens[ends - 1]] if len(contexts) else ends[:0]
    inputs = [batch.token_ids[start : start + size] for start, size in zip(batch.starts[contexts], last, strict=True)]
    parts = split(inputs, budget=tokens_per_micro_batch, num_ranks=num_ranks, share=share)[rank]
    return [
        _micro_batch(batch, [inputs[c] for c in chosen], [tokens[first[c] : ends[c]] for c in chosen], share)
        for chosen in parts
    ]


def _micro_batch(
    batch: Batch, inputs: Sequence[NDArray[np.int32]], tokens: Sequence[Index], share: Share
) -> MicroBatch:
    packed = pack(inputs, share=share)
    flat = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64)
    local = np.repeat(np.arange(len(tokens)), np.array([len(each) for each in tokens], dtype=np.int64))
    placement = packed.place(local, batch.sampled.position[flat], batch.sampled.token_id[flat])
    return MicroBatch(pack=packed, placement=placement, tokens=flat, num_contexts=len(inputs))
