"""Validates a /generate body and turns it into sequences. Refuses every request that could make a step fail."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from actor.engine.request_bodies import GenerateBody, SamplingParamsBody
from actor.engine.sequence import Sampling, Sequence
from protocol.errors import EngineRefused

_T = TypeVar("_T")
_SEED_BITS = 64
_GREEDY_BELOW = 1e-6
"""SGLang decodes greedily at temperatures below this."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of a sequence. Lengths are in tokens."""

    vocab_size: int
    context_length: int
    max_total_tokens: int
    eos_token_ids: frozenset[int]


def to_sequences(
    body: GenerateBody, *, limits: RequestLimits, random_source: random.Random, is_in_flight: Callable[[str], bool]
) -> list[Sequence]:
    """Returns the sequences of a body: one, or one for each prompt of a batch.

    `is_in_flight` returns whether a request id is in use. `random_source` seeds the sequences without `sampling_seed`.

    Raises: EngineRefused naming the field, the bound and the value.
    """
    if body.stream:
        raise EngineRefused("stream must be false (the embedded engine returns whole sequences only), got True")
    if not body.input_ids:
        raise EngineRefused("input_ids must have >= 1 token, got 0")
    prompts: list[list[int]] = body.input_ids if is_batch(body) else [body.input_ids]  # pyright: ignore[reportAssignmentType]
    num = len(prompts)
    rids = _rids(body.rid, num=num)
    params = _one_per_sequence(body.sampling_params, name="sampling_params", num=num)
    logprobs = _one_per_sequence(body.return_logprob, name="return_logprob", num=num)
    seen: set[str] = set()
    for rid in rids:
        if is_in_flight(rid) or rid in seen:
            raise EngineRefused(f"rid must be unique among requests in flight, got {rid!r} twice")
        seen.add(rid)
    return [
        Sequence(
            rid=rids[i],
            prompt_ids=_checked_prompt(
                prompts[i], name=f"input_ids[{i}]" if is_batch(body) else "input_ids", limits=limits
            ),
            sampling=_sampling(
                params[i], num_prompt_tokens=len(prompts[i]), limits=limits, random_source=random_source
            ),
            return_logprob=logprobs[i],
            shares_prefixes=body.extra_key is None,
        )
        for i in range(num)
    ]


def is_batch(body: GenerateBody) -> bool:
    return bool(body.input_ids) and isinstance(body.input_ids[0], list)


def _one_per_sequence(value: _T | list[_T], *, name: str, num: int) -> list[_T]:
    """Returns `value` as a list of `num` values: a single value is repeated. Raises: EngineRefused."""
    if not isinstance(value, list):
        return [value] * num
    if len(value) != num:
        raise EngineRefused(f"{name} must have one entry for each of {num} sequences, got {len(value)}")
    return value


def _rids(rid: str | list[str] | None, *, num: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(num)]
    if isinstance(rid, str):
        return [rid] if num == 1 else [f"{rid}_{i}" for i in range(num)]
    return _one_per_sequence(rid, name="rid", num=num)


def _checked_prompt(prompt: list[int], *, name: str, limits: RequestLimits) -> list[int]:
    if not prompt:
        raise EngineRefused(f"{name} must have >= 1 token, got 0")
    if len(prompt) >= limits.context_length:
        raise EngineRefused(
            f"{name} must have < {limits.context_length} tokens (the context length), got {len(prompt)}"
        )
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < limits.vocab_size:
            raise EngineRefused(
                f"{name}: token ids must be >= 0 and < {limits.vocab_size} (the vocabulary), got {token_id}"
            )
    return prompt


def _sampling(
    params: SamplingParamsBody, *, num_prompt_tokens: int, limits: RequestLimits, random_source: random.Random
) -> Sampling:
    room = min(limits.context_length, limits.max_total_tokens) - num_prompt_tokens
    max_new_tokens = params.max_new_tokens if params.max_new_tokens is not None else max(room, 0)
    if max_new_tokens > room:
        bound = (
            f"{limits.context_length} (the context length)"
            if limits.context_length <= limits.max_total_tokens
            else f"{limits.max_total_tokens} (max_total_tokens)"
        )
        raise EngineRefused(
            f"input_ids and max_new_tokens together must be <= {bound}, got {num_prompt_tokens} + {max_new_tokens} "
            f"= {num_prompt_tokens + max_new_tokens}"
        )
    if params.min_new_tokens > max_new_tokens:
        raise EngineRefused(f"min_new_tokens must be <= {max_new_tokens} (max_new_tokens), got {params.min_new_tokens}")
    if params.top_k == 0:
        raise EngineRefused("top_k must be -1 (off) or >= 1, got 0")
    greedy = params.temperature < _GREEDY_BELOW
    stops = () if params.ignore_eos else (*(params.stop_token_ids or ()), *limits.eos_token_ids)
    strings = [params.stop] if isinstance(params.stop, str) else params.stop or []
    seed = params.sampling_seed
    return Sampling(
        temperature=1.0 if greedy else params.temperature,
        greedy=greedy,
        top_p=params.top_p,
        top_k=params.top_k if params.top_k > 0 else None,
        max_new_tokens=max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        stop_token_ids=frozenset(stops),
        stop_strings=tuple(string for string in strings if string),
        skip_special_tokens=params.skip_special_tokens,
        no_stop_trim=params.no_stop_trim,
        seed=random_source.getrandbits(_SEED_BITS) if seed is None else seed % 2**_SEED_BITS,
    )
