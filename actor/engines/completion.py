"""Parses and validates responses of /generate: ids, log-probs and weight versions must cover the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import EngineError, EngineRefused, EngineUnavailable, UnknownVersion
from protocol.framing import describe
from protocol.types import PolicyTag


class Span(NamedTuple):
    """Completion tokens [start, end) were sampled with the weights that the engine calls `weight_version`."""

    start: int
    end: int
    weight_version: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a generation ended. `matched`: the stop token, which is the last id of the completion."""

    type: Literal["stop", "length"]
    matched: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """n >= 1 sampled tokens.

    token_ids  int32   [n]  including the stop token
    logprobs   float32 [n]  at the sampling temperature
    spans      in ascending order, disjoint; together they cover [0, n)
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: Finish
    spans: tuple[Span, ...]
    prompt_tokens: int
    cached_tokens: int
    engine: str = ""


_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class _ResponseModel(BaseModel):
    """Ignores unknown fields: SGLang adds fields with each release."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _FinishFields(_ResponseModel):
    type: str
    matched: int | str | None = None
    message: str | None = None
    status_code: int | None = None


class _SpanFields(_ResponseModel):
    version: str
    start: int
    end: int


class _MetaInfo(_ResponseModel):
    """Fields with the default 0 or empty are absent if SGLang aborted the request while it was queued."""

    finish_reason: _FinishFields
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    weight_version: str | None = None
    weight_versions: list[_SpanFields] | None = None
    output_token_logprobs: list[tuple[float, _TokenId, str | None]] = []


class _GenerateResponse(_ResponseModel):
    output_ids: list[_TokenId] = []
    meta_info: _MetaInfo


def parse_completion(body: bytes, *, seen_version: str | None, engine: str) -> tuple[Completion, str]:
    """Returns the completion in a response of /generate, and the weight version that the engine serves at its end.

    SGLang 0.5.17 states no spans, only the version at the end. Then the whole completion is attributed to
    `seen_version`, the version that the engine served before the request was sent. Publications only increase, so this
    is exact if the two versions are equal, and the older of the two otherwise. If the version at the end is older, or
    is not of the same run, the engine was restarted and the completion's version is unknown.

    Raises: EngineError (unusable response), EngineUnavailable (aborted: the partial tokens are dropped),
    EngineRefused, UnknownVersion.
    """
    try:
        response = _GenerateResponse.model_validate_json(body)
    except ValidationError as error:
        raise EngineError(f"{engine} /generate: invalid response: {describe(error)}") from error
    meta, num_tokens = response.meta_info, len(response.output_ids)
    finish = _finish(meta.finish_reason, engine)
    ids = np.asarray(response.output_ids, dtype=np.int32)
    logprobs = np.asarray([entry[0] for entry in meta.output_token_logprobs], dtype=np.float32)
    if not num_tokens == len(logprobs) == meta.completion_tokens or num_tokens == 0:
        raise EngineError(
            f"{engine} /generate: output_ids, output_token_logprobs and completion_tokens must agree and be >= 1, got "
            f"{num_tokens}, {len(logprobs)} and {meta.completion_tokens}"
        )
    if meta.prompt_tokens < 1:
        raise EngineError(f"{engine} /generate: prompt_tokens must be >= 1, got {meta.prompt_tokens}")
    if response.output_ids != [entry[1] for entry in meta.output_token_logprobs]:
        raise EngineError(f"{engine} /generate: output_ids differ from the ids of output_token_logprobs")
    if not np.isfinite(logprobs).all():
        raise EngineError(f"{engine} /generate: log-probs must be finite, got {logprobs[~np.isfinite(logprobs)][:3]}")
    if finish.matched is not None and finish.matched != ids[-1]:
        raise EngineError(f"{engine} /generate: stopped at token {finish.matched}, but the last id is {ids[-1]}")
    spans = _spans(meta, num_tokens, seen_version, engine)
    completion = Completion(ids, logprobs, finish, spans, meta.prompt_tokens, meta.cached_tokens, engine)
    return completion, meta.weight_version or spans[-1].weight_version


def _finish(fields: _FinishFields, engine: str) -> Finish:
    match fields.type:
        case "length":
            return Finish("length")
        case "stop":
            return Finish("stop", fields.matched if isinstance(fields.matched, int) else None)
        case "abort" if fields.status_code is not None and 400 <= fields.status_code < 500:
            raise EngineRefused(f"{engine} /generate: {fields.message}")
        case "abort":
            raise EngineUnavailable(f"{engine} /generate: aborted: {fields.message or 'no reason given'}")
        case other:
            raise EngineError(f"{engine} /generate: unknown finish_reason {other!r:.40}")


def _spans(meta: _MetaInfo, num_tokens: int, seen_version: str | None, engine: str) -> tuple[Span, ...]:
    if meta.weight_versions is None:
        if meta.weight_version is None or seen_version is None:
            raise UnknownVersion(
                f"{engine} /generate: no weight_versions, and the version before the request is unknown"
            )
        if meta.weight_version != seen_version:
            before, after = PolicyTag.parse(seen_version), PolicyTag.parse(meta.weight_version)
            if before.run_id != after.run_id or before.publication > after.publication:
                raise UnknownVersion(
                    f"{engine}: the version changed during the request from {before} to {after}, which is older "
                    "or of another run"
                )
        return (Span(0, num_tokens, seen_version),)
    spans = tuple(Span(s.start, s.end, s.version) for s in meta.weight_versions)
    starts = [span.start for span in spans]
    ends = [span.end for span in spans]
    if not spans or starts != [0, *ends[:-1]] or ends[-1] != num_tokens or any(s >= e for s, e, _ in spans):
        raise EngineError(f"{engine} /generate: weight_versions must cover [0, {num_tokens}), got {spans}")
    return spans
