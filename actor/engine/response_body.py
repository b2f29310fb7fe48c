"""The response body of /generate, built from a finished sequence."""

from __future__ import annotations

from typing import TypedDict

from actor.engine.sequence import Finish, FinishType, Sequence


class FinishReason(TypedDict, total=False):
    type: str
    length: int | None
    matched: int | str | None
    message: str | None


class VersionSpanFields(TypedDict):
    version: str
    start: int
    end: int


class MetaInfo(TypedDict, total=False):
    """SGLang's `meta_info`. `output_token_logprobs` is present only if the request set `return_logprob`."""

    id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    weight_versions: list[VersionSpanFields]
    num_retractions: int
    output_token_logprobs: list[tuple[float, int, None]]


class GenerateResponse(TypedDict):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo


def generate_response(sequence: Sequence, *, text: str, weight_version: str) -> GenerateResponse:
    """Builds the response for a finished sequence.

    `weight_version` is the version that the engine serves when the sequence ends; `weight_versions` in the response
    states which version sampled which tokens.
    """
    assert sequence.finish is not None
    meta: MetaInfo = {
        "id": sequence.rid,
        "finish_reason": _finish_reason(sequence.finish),
        "prompt_tokens": len(sequence.prompt_ids),
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": sequence.num_cached_tokens,
        "weight_version": weight_version,
        "weight_versions": [{"version": v.version, "start": v.start, "end": v.end} for v in sequence.version_spans],
        "num_retractions": sequence.num_retractions,
    }
    if sequence.return_logprob:
        meta["output_token_logprobs"] = [
            (logprob, token_id, None)
            for logprob, token_id in zip(sequence.output_logprobs, sequence.output_ids, strict=True)
        ]
    return {"text": text, "output_ids": sequence.output_ids, "meta_info": meta}


def _finish_reason(finish: Finish) -> FinishReason:
    match finish.type:
        case FinishType.LENGTH:
            return {"type": "length", "length": finish.length}
        case FinishType.STOP:
            return {"type": "stop", "matched": finish.matched}
        case FinishType.ABORT:
            return {"type": "abort", "message": finish.message}
