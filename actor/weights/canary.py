"""Checks that an engine computes with a publication's weights, on prompts whose log-probs the learner computed."""

from __future__ import annotations

import asyncio

from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient
from actor.weights.fetch import PreparedWeights
from protocol.errors import WeightsError

_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=1, allow_truncation=True)


class CanaryTimeout(WeightsError):
    """The engine did not respond in time."""


async def measure_canary_error(engine: SGLangClient, prepared: PreparedWeights, *, timeout_s: float) -> float:
    """Samples the canary's prompts on the engine, one token each.

    Returns the mean absolute difference, in nats, of the engine's and the learner's log-probs; 0 without a canary.

    Raises: EngineError (a request failed), CanaryTimeout, WeightsError (sampled with other weights, or cached prefix).
    """
    canary = prepared.canary
    if canary is None or not canary.prompts:
        return 0.0
    try:
        async with asyncio.timeout(timeout_s):
            generations = (engine.generate(prompt, _SAMPLING, rid="canary") for prompt in canary.prompts)
            completions = await asyncio.gather(*generations)
    except TimeoutError:
        raise CanaryTimeout(f"no response to the canary in {timeout_s:g} s") from None
    for prompt, completion in zip(canary.prompts, completions, strict=True):
        version = completion.spans[0].weight_version
        if version != str(prepared.tag):
            raise WeightsError(f"the canary must be sampled with {prepared.tag}, got {version}")
        # A resumed request may share a 1–2-token prefix with the canary; only an earlier canary shares half of it.
        if 2 * completion.cached_tokens >= len(prompt):
            raise WeightsError(f"the canary found {completion.cached_tokens} tokens of old weights in the prefix cache")
    errors = [abs(float(c.logprobs[0]) - wanted) for c, wanted in zip(completions, canary.logprobs, strict=True)]
    return sum(errors) / len(errors)
