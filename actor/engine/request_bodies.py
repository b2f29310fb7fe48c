"""Request bodies of SGLang's native HTTP API, as the embedded engine accepts them.

Unknown keys are refused. An SGLang parameter that the engine does not implement is accepted only with the value that
has no effect. So a client may send SGLang's defaults, and no parameter is ignored silently.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import EngineRefused

_MAX_SHOWN_CHARS = 120
_UNION_MEMBER = re.compile(r"^(str|bool|SamplingParamsBody|list\[.*\])$")
_Body = TypeVar("_Body", bound=BaseModel)

Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]

# A list is refused at its first invalid entry. Bodies are parsed in the event loop that runs the engine's steps: one
# error for each of 10^5 entries would block it for seconds.
_Item = TypeVar("_Item")
FailFastList = Annotated[list[_Item], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SamplingParamsBody(_StrictBody):
    """`sampling_params` of /generate. `max_new_tokens` null: up to the context length."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    max_new_tokens: Annotated[int, Field(ge=0)] | None = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    stop: str | FailFastList[str] | None = None
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


class GenerateBody(_StrictBody):
    """POST /generate. If `input_ids` is a list of lists, the body is a batch, and `sampling_params`, `rid` and
    `return_logprob` may be lists too.

    SGLang shares cached prefixes only among requests of the same `extra_key`. In this engine, a request with an
    `extra_key` uses no cached prefix and caches none.
    """

    input_ids: TokenIds | FailFastList[TokenIds]
    sampling_params: SamplingParamsBody | FailFastList[SamplingParamsBody] = SamplingParamsBody()
    rid: str | FailFastList[str] | None = None
    return_logprob: bool | FailFastList[bool] = False
    extra_key: str | FailFastList[str] | None = None

    stream: bool = False
    logprob_start_len: Annotated[int, Field(ge=-1, le=-1)] | None = None
    top_logprobs_num: Zero | None = None
    return_text_in_logprobs: Literal[False] = False
    return_hidden_states: Literal[False] = False
    token_ids_logprob: None = None
    lora_path: None = None
    priority: int | None = None
    log_metrics: bool = True


class UpdateBody(_StrictBody):
    """POST /update_weights_from_disk. Without `weight_version` the version does not change, as in SGLang."""

    model_path: Annotated[str, Field(min_length=1)]
    weight_version: Annotated[str, Field(min_length=1)] | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    load_format: str | None = None
    keep_pause: bool = False


class PauseMode(StrEnum):
    """What a pause does to requests in flight.

    `abort` ends them, `retract` drops their KV cache and queues them again, `in_place` stops them and keeps their KV.
    """

    ABORT = "abort"
    RETRACT = "retract"
    IN_PLACE = "in_place"


class PauseBody(_StrictBody):
    """POST /pause_generation."""

    mode: Annotated[PauseMode, Field(strict=False)] = PauseMode.ABORT


class ContinueBody(_StrictBody):
    """POST /continue_generation."""


class AbortBody(_StrictBody):
    """POST /abort_request: one request by its id, or all requests. An id that is not in flight is not an error."""

    rid: str | None = None
    abort_all: bool = False


def parse_body(model: type[_Body], body: bytes) -> _Body:
    """Parses a JSON body. An empty body is read as `{}`.

    Raises: EngineRefused naming the first invalid field, its bound and the value.
    """
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise EngineRefused(_describe(error)) from error


def _describe(error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_context=False)
    # Every member of a union reports an error: show the deepest one, whose member fits the value best.
    first = max(errors, key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['msg']}"
    if first["loc"] and first["loc"][0] == "input_ids" and first["type"] != "missing":
        return f"input_ids must be a list of token ids or a list of such lists, got {_shortened(first['input'])}"
    # Pydantic adds the names of union members to the location: remove them, so that the path names the field.
    path = ".".join(str(part) for part in first["loc"] if not _UNION_MEMBER.match(str(part)))
    if first["type"] == "extra_forbidden":
        return f"{path} is not a parameter of the embedded engine, got {_shortened(first['input'])}"
    if first["type"] == "missing":
        return f"{path} is required"
    return f"{path or 'the body'}: {first['msg']}, got {_shortened(first['input'])}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"
