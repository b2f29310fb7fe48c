"""One sequence in the engine: its prompt and sampling parameters, its sampled tokens and their weight versions."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishType(StrEnum):
    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended. `matched`: the stop token id or stop string. `message`: the reason of an abort."""

    type: FinishType
    length: int | None = None
    matched: int | str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Validated sampling parameters. `greedy` is SGLang's temperature 0; `temperature` is then 1, for the log-probs."""

    temperature: float
    greedy: bool
    top_p: float
    top_k: int | None
    max_new_tokens: int
    min_new_tokens: int
    stop_token_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    skip_special_tokens: bool
    no_stop_trim: bool
    seed: int


@dataclass(slots=True)
class VersionSpan:
    """Output tokens [start, end) were sampled with the weights `version`."""

    version: str
    start: int
    end: int


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens sampled after it. A retracted sequence loses its KV cache and keeps all fields."""

    rid: str
    prompt_ids: list[int]
    sampling: Sampling
    return_logprob: bool
    shares_prefixes: bool = True
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    version_spans: list[VersionSpan] = field(default_factory=list)
    num_retractions: int = 0
    finish: Finish | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that were in the cache when the sequence was admitted."""
    cache_epoch: int = -1
    """The scheduler's `epoch` when the sequence was admitted."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def tokens(self) -> list[int]:
        return self.prompt_ids + self.output_ids

    @property
    def num_reserved_tokens(self) -> int:
        """The largest number of tokens that this sequence can reach, prompt included."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def record(self, *, token_id: int, logprob: float, version: str) -> None:
        """Appends a sampled token, and sets `finish` if the token ends the sequence.

        The length is checked before the stop tokens, as in SGLang: a stop token that is also the last token allowed by
        `max_new_tokens` gives the finish reason `length`.
        """
        self.output_ids.append(token_id)
        self.output_logprobs.append(logprob)
        num_output = len(self.output_ids)
        if self.version_spans and self.version_spans[-1].version == version:
            self.version_spans[-1].end = num_output
        else:
            self.version_spans.append(VersionSpan(version, num_output - 1, num_output))
        if num_output >= self.sampling.max_new_tokens:
            self.finish = Finish(FinishType.LENGTH, length=self.sampling.max_new_tokens)
        elif token_id in self.sampling.stop_token_ids:
            self.finish = Finish(FinishType.STOP, matched=token_id)

    def abort(self, message: str) -> None:
        """Ends the sequence and keeps its sampled tokens. Does nothing if the sequence is finished."""
        if self.finish is None:
            self.finish = Finish(FinishType.ABORT, message=message)
