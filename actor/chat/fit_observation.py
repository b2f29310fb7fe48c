"""Shortens an observation so that it fits into the remaining tokens of a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from actor.chat.rendering import Rendering, Result
from actor.chat.tokenizer import Tokenizer
from actor.tools.tool import Observation

# Cutting a text can change how the text next to it is encoded, so the first result may be a few tokens too long.
_MAX_ROUNDS = 4


def fit_observation(
    rendering: Rendering, tokenizer: Tokenizer, results: Sequence[Result], num_tokens: int
) -> tuple[list[int], bool] | None:
    """Returns the observation's ids, at most `num_tokens`, and whether passages were shortened.

    The longest passages are cut first, all to the same length. Returns None if the observation does not fit even
    without the texts of its passages.
    """
    ids = tokenizer.encode(rendering.observation(results))
    if len(ids) <= num_tokens:
        return ids, False
    lengths = [len(tokenizer.encode(p.text)) for result in results for p in result.observation.passages]
    bare = len(tokenizer.encode(rendering.observation(_shortened(tokenizer, results, 0))))
    available = num_tokens - bare
    for _ in range(_MAX_ROUNDS):
        if available < 0:
            return None
        cut = _shortened(tokenizer, results, longest_that_fits(lengths, available))
        ids = tokenizer.encode(rendering.observation(cut))
        if len(ids) <= num_tokens:
            return ids, True
        available -= len(ids) - num_tokens
    return None


def longest_that_fits(lengths: Sequence[int], available: int) -> int:
    """Returns the largest m with sum(min(length, m)) <= available; the longest length if all of them fit."""
    remaining, count = available, len(lengths)
    for length in sorted(lengths):
        if length * count > remaining:
            return remaining // count
        remaining -= length
        count -= 1
    return max(lengths, default=0)


def _shortened(tokenizer: Tokenizer, results: Sequence[Result], num_tokens: int) -> list[Result]:
    return [replace(result, observation=_cut(tokenizer, result.observation, num_tokens)) for result in results]


def _cut(tokenizer: Tokenizer, observation: Observation, num_tokens: int) -> Observation:
    passages = (replace(p, text=tokenizer.truncate(p.text, num_tokens)) for p in observation.passages)
    return replace(observation, passages=tuple(passages))
