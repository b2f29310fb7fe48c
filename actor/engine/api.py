"""Bodies of SGLang's native HTTP API, as the embedded engine takes them.

Unknown keys are refused. SGLang's parameters that the engine does not implement are known and accepted at the value
at which they do nothing, so that a client's defaults pass and nothing is silently ignored.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import EngineRefused

_MAX_SHOWN = 120
_UNION_MEMBER = re.compile(r"^(str|bool|SamplingParams|list\[.*\])$")
_Body = TypeVar("_Body", bound=BaseModel)

Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]

# Lists are refused at their first wrong entry: bodies are read in the loop that makes the engine's steps, and an error
# for each of 10^5 entries would stop it for seconds.
_Item = TypeVar("_Item")
Listed = Annotated[list[_Item], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SamplingParams(_Strict):
    """`sampling_params` of /generate. `max_new_tokens` null means up to the context's end."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    max_new_tokens: Annotated[int, Field(ge=0)] | None = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    stop: str | Listed[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None

    spaces_between_special_tokens: bool = True
    n: One = 1
    min_p: Zero = 0.0
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    repetition_penalty: One = 1.0
    stop_regex: None = None
    json_schema: None = None
    regex: None = None
    ebnf: None = None
    structural_tag: None = None
    logit_bias: None = None
    custom_params: None = None
    stream_interval: int | None = None


class GenerateBody(_Strict):
    """POST /generate. A list of lists is a batch; then `sampling_params`, `rid` and `return_logprob` may be lists.

    `extra_key` salts SGLang's prefix cache; here there is none, so it is accepted and does nothing.
    """

    input_ids: TokenIds | Listed[TokenIds]
    sampling_params: SamplingParams | Listed[SamplingParams] = SamplingParams()
    rid: str | Listed[str] | None = None
    return_logprob: bool | Listed[bool] = False
    extra_key: str | Listed[str] | None = None

    stream: bool = False
    logprob_start_len: Annotated[int, Field(ge=-1, le=-1)] | None = None
    top_logprobs_num: Zero | None = None
    return_text_in_logprobs: Literal[False] = False
    return_hidden_states: Literal[False] = False
    token_ids_logprob: None = None
    lora_path: None = None
    priority: int | None = None
    log_metrics: bool = True


class UpdateBody(_Strict):
    """POST /update_weights_from_disk. Without `weight_version` the version stays as it is, as in SGLang."""

    model_path: Annotated[str, Field(min_length=1)]
    weight_version: Annotated[str, Field(min_length=1)] | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    load_format: str | None = None
    keep_pause: bool = False


class PauseMode(StrEnum):
    """What becomes of requests in flight: they end, they queue up without their KV, or they stop where they are."""

    ABORT = "abort"
    RETRACT = "retract"
    IN_PLACE = "in_place"


class PauseBody(_Strict):
    """POST /pause_generation."""

    mode: Annotated[PauseMode, Field(strict=False)] = PauseMode.ABORT


class ContinueBody(_Strict):
    """POST /continue_generation."""


class AbortBody(_Strict):
    """POST /abort_request: one request by its id, or all of them. An id that is not in flight is no error."""

    rid: str | None = None
    abort_all: bool = False


def parse(model: type[_Body], body: bytes) -> _Body:
    """Read a JSON body; an empty one is `{}`.

    Raises: EngineRefused naming the first bad field, its bound and the value.
    """
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise EngineRefused(_describe(error)) from error


def _describe(error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_context=False)
    # Of a union, the member that was meant is the one whose error lies deepest.
    first = max(errors, key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['msg']}"
    if first["loc"] and first["loc"][0] == "input_ids" and first["type"] != "missing":
        return f"input_ids must be a list of token ids or a list of such lists, got {_shown(first['input'])}"
    # Pydantic puts the names of union members into the location: only the field's own path helps the caller.
    path = ".".join(str(part) for part in first["loc"] if not _UNION_MEMBER.match(str(part)))
    if first["type"] == "extra_forbidden":
        return f"{path} is not a parameter that the embedded engine knows, got {_shown(first['input'])}"
    if first["type"] == "missing":
        return f"{path} is required"
    return f"{path or 'the body'}: {first['msg']}, got {_shown(first['input'])}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
