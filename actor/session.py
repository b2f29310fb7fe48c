"""Records the tokens of one episode between a workflow and the engines.

    open_context(prompt) ─► generate ─► append(observation) ─► generate ─► close_context ─► contexts
                              │ the engine gets exactly the ids so far; the ids that it samples are appended

Within a context, no token is decoded and encoded again. Sampled tokens are decoded only for parsing. Each appended
piece of text is encoded once, separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actor.chat.tokenizer import Tokenizer
from actor.engines.completion import Completion, Span
from actor.engines.pool import Generator
from actor.engines.sampling import SamplingParams
from actor.tools.tool import Observation, Tool, ToolContext
from protocol.errors import ConfigError, PalimpsestError, UnknownVersion
from protocol.types import Context, Edge, PolicyTag, Question, VersionSpan


class BudgetExceeded(PalimpsestError):
    """The open context has no room for another token; nothing was sampled.

    If the workflow does not catch it, the trajectory ends as OVER_BUDGET.
    """


class ToolFailed(PalimpsestError):
    """A tool raised an exception, stored as `__cause__`. The trajectory fails."""

    def __init__(self, tool: Tool) -> None:
        super().__init__(f"the tool {type(tool).__qualname__} failed")
        self.tool = tool


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """n sampled tokens, int32 [n], and their text without the stop token.

    finish: `stop` if the last id is one of the requested stop ids (also if it is the last permitted token, for which
    engines report `length`); `illegal_stop` if the engine stopped at another id; `length` if it was cut off.
    """

    text: str
    token_ids: NDArray[np.int32]
    finish: Literal["stop", "illegal_stop", "length"]


class Session:
    """The tokens of one episode. It generates one piece at a time; tool calls may run concurrently.

    pool                engines to sample from
    run_id              None only for evaluation, where nothing is trained: a version that is not a `PolicyTag` is then
                        recorded as 0
    max_context_tokens  bound of a context, prompt and observations included
    question, rid       the episode's question and id, which tools get in their `ToolContext`
    """

    def __init__(
        self,
        *,
        pool: Generator,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        run_id: str | None,
        min_version: int = 0,
        max_context_tokens: int,
        question: Question | None = None,
        rid: str = "",
    ) -> None:
        if max_context_tokens < 2:
            raise ConfigError(f"max_context_tokens must be >= 2, got {max_context_tokens}")
        if run_id is not None and sampling.truncates:
            raise ConfigError("tokens of a run are trained on: sampling must not truncate (allow_truncation is set)")
        self.tokenizer = tokenizer
        self.num_generations = 0
        self.num_tool_calls = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self._pool = pool
        self._sampling = sampling
        self._run_id = run_id
        self._min_version = min_version
        self._max_context_tokens = max_context_tokens
        self._rid = rid
        self._tool_context = ToolContext(question=question or Question("", "", ()), episode_id=rid)
        self._engine = ""
        self._open: _OpenContext | None = None
        self._closed: list[Context] = []
        self._weight_versions: dict[str, None] = {}

    @property
    def weight_versions(self) -> tuple[str, ...]:
        """The weight versions that sampled tokens, as the engines state them, in the order of their first use."""
        return tuple(self._weight_versions)

    @property
    def contexts(self) -> tuple[Context, ...]:
        """The closed contexts."""
        return tuple(self._closed)

    @property
    def is_open(self) -> bool:
        """Whether a context is open."""
        return self._open is not None

    @property
    def room(self) -> int:
        """How many more tokens the open context can hold. Raises: RuntimeError if no context is open."""
        return self._max_context_tokens - len(self._current.ids)

    @property
    def _current(self) -> _OpenContext:
        if self._open is None:
            raise RuntimeError("no context is open: call open_context first")
        return self._open

    def open_context(
        self,
        prompt: str | Sequence[int],
        *,
        role: str = "agent",
        policy: str = "main",
        turn: int | None = None,
        edge: Edge | None = None,
    ) -> None:
        """Begins a context with `prompt`, which the policy reads and did not sample.

        By default `turn` is the number of closed contexts, and `edge` is START for the first context and MEMORY_RESET
        for later ones. Raises: RuntimeError if a context is open.
        """
        if self._open is not None:
            raise RuntimeError("a context is open: call close_context first")
        turn = len(self._closed) if turn is None else turn
        edge = edge or (Edge.MEMORY_RESET if self._closed else Edge.START)
        self._open = _OpenContext(role=role, policy=policy, turn=turn, edge=edge)
        self.append(prompt)

    def append(self, piece: str | Sequence[int]) -> None:
        """Adds tokens that the policy reads and did not sample (loss mask false)."""
        ids = self.tokenizer.encode(piece) if isinstance(piece, str) else list(piece)
        self._current.append(ids)
        self.num_prompt_tokens += len(ids)

    async def generate(self, max_new_tokens: int, stop_token_ids: Sequence[int] | None = None) -> Generation:
        """Samples at most `max_new_tokens` (fewer if the context has less room) and records them.

        It stops at `stop_token_ids`, by default the tokenizer's end-of-sequence token, which is recorded as well.
        Raises: BudgetExceeded (no room), EngineError or a subclass; nothing is recorded then.
        """
        context = self._current
        if stop_token_ids is None:
            stop_token_ids = (self.tokenizer.eos_token_id,)
        if self.room < 1:
            raise BudgetExceeded(
                f"a context must have at most workflow.context_tokens = {self._max_context_tokens} tokens, this one of "
                f"turn {context.turn} has {len(context.ids)}: raise the limit or add less to the context"
            )
        sampling = replace(
            self._sampling,
            max_new_tokens=min(max_new_tokens, self.room),
            stop_token_ids=tuple(stop_token_ids),
            seed=self._sampling.derived_seed(self.num_generations),
        )
        completion = await self._pool.generate(
            context.ids, sampling, min_version=self._min_version, prefer=self._engine, rid=self._rid
        )
        context.record(completion, [self._version_span(span) for span in completion.spans])
        self._engine = completion.engine
        self._weight_versions.update(dict.fromkeys(span.weight_version for span in completion.spans))
        self.num_generations += 1
        self.num_generated_tokens += len(completion.token_ids)
        self.num_cached_tokens += completion.cached_tokens
        return self._generation(completion, stop_token_ids)

    def close_context(self) -> Context:
        """Ends the open context and returns it."""
        context = self._current.build()
        self._closed.append(context)
        self._open = None
        return context

    async def call(self, tool: Tool, arguments: Mapping[str, Any]) -> Observation:
        """Calls a tool for this episode and counts it. The observation is not appended: the workflow decides that.

        Raises: ToolFailed if the tool raises; errors of remote services (RemoteError, EngineError) pass through.
        """
        self.num_tool_calls += 1
        try:
            observation = await tool.call(arguments, self._tool_context)
            if not isinstance(observation, Observation):
                raise TypeError(f"call must return an Observation, got {type(observation).__name__}")
        except PalimpsestError:
            raise
        except (Exception, SystemExit) as error:
            raise ToolFailed(tool) from error
        return observation

    def stats(self) -> dict[str, float]:
        """Counts of the episode so far, by metric name."""
        lengths = [len(context) for context in self._closed]
        return {
            "num_turns": float(len(lengths)),
            "num_generations": float(self.num_generations),
            "num_tool_calls": float(self.num_tool_calls),
            "num_prompt_tokens": float(self.num_prompt_tokens),
            "num_cached_tokens": float(self.num_cached_tokens),
            "num_generated_tokens": float(self.num_generated_tokens),
            "peak_context_tokens": float(max(lengths, default=0)),
        }

    def transcripts(self) -> tuple[str, ...]:
        """The text of each closed context, special tokens included."""
        return tuple(self.tokenizer.decode(context.token_ids.tolist()) for context in self._closed)

    def _generation(self, completion: Completion, stop_token_ids: Sequence[int]) -> Generation:
        ids = completion.token_ids
        if int(ids[-1]) in stop_token_ids:
            return Generation(self.tokenizer.decode(ids[:-1].tolist()), ids, "stop")
        if completion.finish_reason.type == "length":
            return Generation(self.tokenizer.decode(ids.tolist()), ids, "length")
        return Generation(self.tokenizer.decode(ids[:-1].tolist()), ids, "illegal_stop")

    def _version_span(self, span: Span) -> VersionSpan:
        try:
            tag = PolicyTag.parse(span.weight_version)
        except UnknownVersion:
            if self._run_id is not None:
                raise
            return VersionSpan(span.start, span.end, version=0, publication=0)
        if self._run_id not in (None, tag.run_id):
            raise UnknownVersion(f"tokens were sampled by {tag}, which is not of run {self._run_id!r}")
        return VersionSpan(span.start, span.end, tag.version, tag.publication)


class _OpenContext:
    """The token columns of a context that is not closed yet."""

    def __init__(self, *, role: str, policy: str, turn: int, edge: Edge) -> None:
        self.role, self.policy, self.turn, self.edge = role, policy, turn, edge
        self.ids: list[int] = []
        self._mask: list[bool] = []
        self._logprobs: list[float] = []
        self._spans: list[VersionSpan] = []

    def append(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self._mask.extend([False] * len(ids))
        self._logprobs.extend([0.0] * len(ids))

    def record(self, completion: Completion, spans: Sequence[VersionSpan]) -> None:
        """Appends sampled tokens. `spans` are relative to the completion; adjacent equal versions are merged."""
        offset = len(self.ids)
        self.ids.extend(completion.token_ids.tolist())
        self._mask.extend([True] * len(completion.token_ids))
        self._logprobs.extend(completion.logprobs.tolist())
        for span in spans:
            moved = span._replace(start=span.start + offset, end=span.end + offset)
            last = self._spans[-1] if self._spans else None
            if last and (last.end, last.version, last.publication) == (moved.start, moved.version, moved.publication):
                self._spans[-1] = last._replace(end=moved.end)
            else:
                self._spans.append(moved)

    def build(self) -> Context:
        return Context(
            token_ids=np.asarray(self.ids, dtype=np.int32),
            loss_mask=np.asarray(self._mask, dtype=np.bool_),
            behavior_logprobs=np.asarray(self._logprobs, dtype=np.float32),
            policy_versions=tuple(self._spans),
            role=self.role,
            policy=self.policy,
            turn=self.turn,
            edge=self.edge,
        )
