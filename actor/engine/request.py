"""One sequence on its way through the engine: what was asked, what was sampled, and under which weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishType(StrEnum):
    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended. `matched` is a token id or a stop string; `message` says why it was aborted."""

    type: FinishType
    length: int | None = None
    matched: int | str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Checked sampling parameters. `greedy` stands for SGLang's temperature 0; log-probs are then at temperature 1."""

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
class VersionRun:
    """Output tokens [start, end) were sampled under `version`."""

    version: str
    start: int
    end: int


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens sampled after it. It outlives its KV: a retracted sequence keeps all of this."""

    rid: str
    prompt_ids: list[int]
    sampling: Sampling
    return_logprob: bool
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    versions: list[VersionRun] = field(default_factory=list)
    num_retractions: int = 0
    finish: Finish | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_reserved_tokens(self) -> int:
        """The most tokens that this sequence can come to hold."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def record(self, *, token_id: int, logprob: float, version: str) -> None:
        """Append a sampled token, and finish where it ends the sequence.

        The length is looked at before the stop tokens, as SGLang does: a stop token in the last place that
        `max_new_tokens` allows reads as `length`.
        """
        self.output_ids.append(token_id)
        self.output_logprobs.append(logprob)
        num_output = len(self.output_ids)
        if self.versions and self.versions[-1].version == version:
            self.versions[-1].end = num_output
        else:
            self.versions.append(VersionRun(version, num_output - 1, num_output))
        if num_output >= self.sampling.max_new_tokens:
            self.finish = Finish(FinishType.LENGTH, length=self.sampling.max_new_tokens)
        elif token_id in self.sampling.stop_token_ids:
            self.finish = Finish(FinishType.STOP, matched=token_id)

    def abort(self, message: str) -> None:
        """End the sequence where it stands; what was sampled stays. A finished sequence stays as it is."""
        if self.finish is None:
            self.finish = Finish(FinishType.ABORT, message=message)
