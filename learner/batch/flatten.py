"""Converts groups to flat NumPy columns, one row per sampled token, and computes the tokens' weights in the loss.

    groups ──flatten──► Batch: one row per sampled token [N], per context [C], per trajectory [T]
                          │  microbatches.py: minibatches by trajectory, micro-batches by shared prefix
                          ▼
                        losses on flat tokens, never on padded rows

A token's weight does not depend on the micro-batch or the rank that computes it, so any split into micro-batches, order
or packing gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from learner.algorithms.advantages import Credit
from protocol.errors import MalformedMessage
from protocol.types import Context, Status, TrajectoryGroup

Aggregation = Literal["trajectory", "context", "token", "constant"]
Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """N tokens that the policy sampled, in the order of generation: by trajectory, context and position.

    trajectory, context  int64   [N]  index within the batch
    position             int64   [N]  within the context, >= 1
    token_id             int64   [N]
    behavior_logprob     float32 [N]
    version              int32   [N]
    """

    trajectory: Index
    context: Index
    position: Index
    token_id: Index
    behavior_logprob: NDArray[np.float32]
    version: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.token_id)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """T trajectories (none FAILED) with C contexts; context c is `token_ids[starts[c] : starts[c + 1]]`.

    token_ids       int32   [sum of lengths]
    starts          int64   [C + 1]
    trajectory      int64   [C]  the trajectory of each context
    turn            int64   [C]  the workflow's turn
    role, policy    str     [C]
    context_reward  float64 [C]
    reward, group   float64 and int64 [T]
    """

    token_ids: NDArray[np.int32]
    starts: Index
    trajectory: Index
    turn: Index
    role: tuple[str, ...]
    policy: tuple[str, ...]
    context_reward: NDArray[np.float64]
    reward: NDArray[np.float64]
    group: Index
    sampled: SampledTokens

    @property
    def num_contexts(self) -> int:
        return len(self.starts) - 1

    @property
    def num_trajectories(self) -> int:
        return len(self.reward)

    @property
    def context_index(self) -> Index:
        """int64 [C]: the place of each context in its trajectory, from 0."""
        first = np.searchsorted(self.trajectory, self.trajectory)
        return np.arange(self.num_contexts) - first

    def credit(self, trained: NDArray[np.bool_]) -> Credit:
        """The inputs of an advantage estimator, with only the tokens that `trained` (bool [N]) selects."""
        roles, role = np.unique(np.array(self.role, dtype=np.str_), return_inverse=True)
        _, policy = np.unique(np.array(self.policy, dtype=np.str_), return_inverse=True)
        return Credit(
            reward=self.reward,
            group=self.group,
            owner=self.trajectory,
            role=role.astype(np.int64),
            turn=self.turn,
            trajectory=self.sampled.trajectory[trained],
            context=self.sampled.context[trained],
            policy=policy.astype(np.int64)[self.sampled.context[trained]],
            roles=tuple(roles.tolist()),
            context_reward=self.context_reward,
        )


def flatten(groups: Sequence[TrajectoryGroup], *, last_context_only: bool = False) -> Batch:
    """The columns of every sampled token, context and trajectory of a batch.

    FAILED trajectories are left out. `last_context_only` (an ablation) drops all but the last context of a trajectory.
    Raises: MalformedMessage if the first token of a context is sampled (no forward pass can score it), or if version
    spans do not cover the sampled tokens.
    """
    counted = [(g, t) for g, group in enumerate(groups) for t in group.trajectories if t.status is not Status.FAILED]
    kept = [t.contexts[-1:] if last_context_only else t.contexts for _, t in counted]
    contexts = [context for each in kept for context in each]
    owner = np.repeat(np.arange(len(counted)), np.array([len(each) for each in kept], dtype=np.int64))

    lengths = np.array([len(context) for context in contexts], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    token_ids = _concatenate([context.token_ids for context in contexts], np.int32)
    at = np.flatnonzero(_concatenate([context.loss_mask for context in contexts], np.bool_))
    context_of = np.repeat(np.arange(len(contexts)), lengths)[at]
    sampled = SampledTokens(
        trajectory=owner[context_of],
        context=context_of,
        position=at - starts[context_of],
        token_id=token_ids[at].astype(np.int64),
        behavior_logprob=_concatenate([context.behavior_logprobs for context in contexts], np.float32)[at],
        version=_versions(contexts, num_sampled=len(at)),
    )
    if len(sampled) and int(sampled.position.min()) < 1:
        raise MalformedMessage("context: its first token has no predecessor, so loss_mask[0] must be false, got true")
    return Batch(
        token_ids=token_ids,
        starts=starts,
        trajectory=owner,
        turn=np.array([context.turn for context in contexts], dtype=np.int64),
        role=tuple(context.role for context in contexts),
        policy=tuple(context.policy for context in contexts),
        context_reward=np.array([context.reward for context in contexts], dtype=np.float64),
        reward=np.array([trajectory.reward for _, trajectory in counted], dtype=np.float64),
        group=np.array([group for group, _ in counted], dtype=np.int64),
        sampled=sampled,
    )


def aggregation_weights(
    trajectory: Index, context: Index, *, aggregation: Aggregation, constant: float = 1.0
) -> NDArray[np.float64]:
    """float64 [N]: the weight of each sampled token in the loss; tokens that are masked later count in denominators.

    trajectory, context: int [N], of *every* sampled token of one optimizer step (one minibatch), over all ranks.
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


def _versions(contexts: Sequence[Context], *, num_sampled: int) -> NDArray[np.int32]:
    """int32 [N]: the version of each sampled token. Spans cover exactly the sampled positions, in ascending order."""
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
