"""Chooses the tokens that go through the model: a context whose advantages are all exactly 0 has no gradient.

    trained tokens, advantages ──► select ──► computed   forward and backward, in whole contexts
                                              scored     forward only (pre-pass), in whole scopes of the corrections
                                              signal     a minibatch without such a token makes no update

The weights of the loss are computed before and do not change: skipped tokens count in the denominators. The tokens
that are left are those on which the gradient depends, so it is the same up to the order of its sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from learner.batch.flatten import SampledTokens

Bools = NDArray[np.bool_]
WholeScope = Literal["context", "trajectory", "batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """bool [N] each, over the sampled tokens of a batch; see the head of the file."""

    computed: Bools
    scored: Bools
    signal: Bools


def everything(trained: Bools) -> Selection:
    """Every trained token goes through the model: its loss does not depend on the advantage alone."""
    return Selection(computed=trained, scored=trained, signal=trained)


def select(
    sampled: SampledTokens, trained: Bools, advantage: NDArray[np.floating], *, scope: WholeScope, skip: bool
) -> Selection:
    """The tokens on which the gradient of a loss depends that is 0 for a token of advantage 0.

    trained     bool  [N]
    advantage   float [number of trained tokens]
    scope       the largest group of tokens on which a correction's weight of one token depends
    skip        false: every trained token is computed and scored
    """
    signal = trained.copy()
    signal[trained] = advantage != 0
    if not skip:
        return Selection(computed=trained, scored=trained, signal=signal)
    segments = {"context": sampled.context, "trajectory": sampled.trajectory, "batch": np.zeros_like(sampled.context)}
    return Selection(
        computed=trained & _with_any(signal, sampled.context),
        scored=trained & _with_any(signal, segments[scope]),
        signal=signal,
    )


def _with_any(flags: Bools, segment: NDArray[np.int64]) -> Bools:
    """bool [N]: whether any token of the token's segment has its flag set."""
    found = np.zeros(int(segment.max(initial=-1)) + 1, dtype=np.bool_)
    found[segment[flags]] = True
    return found[segment]
