"""MemSearcher (arXiv 2511.02805): each turn rewrites a memory; the next turn sees only the question and this memory.

    turn k, one context:  prompt(question, memory_k) ─► action ──answer──────────────► the end
                                                          │ tool calls
                                                          ▼
                                                     observation ─► memory_k+1 ─► close; turn k+1

How a trajectory ends (all but FAILED are trained, with the reward that the reward function gives):

    COMPLETED     an action with an answer and no tool call
    FORMAT_ERROR  an action without answer and tool call; unpaired tool tags; a missing or empty memory; a stop at a
                  token other than the end token; an answer after a violated format rule (see `format` below)
    OVER_BUDGET   the last turn's action is a tool call (it is not carried out); an action cut off at `action_tokens`;
                  no room in the context; a memory above its limit, unless it is truncated
    FAILED        an error of an engine or a tool

An invalid tool call gets an error message in the observation, and the trajectory continues.

fidelity         paper                                     mended
memory limit     `action_tokens` per generation; reaching  `memory_tokens` plus the tags per generation; a longer
                 it ends the trajectory                    memory is handled by `memory_overflow`
format           the rules of `check_chat` on the last     all actions: thought and tool tags are paired and
                 context: tags are counted, not paired;    alternate, tool calls are valid JSON; an answer after a
                 JSON of earlier turns is not checked      violation ends as FORMAT_ERROR
call without     10 passages                               the search tool's `top_n`
`top_n`
too long an      ends the trajectory                       passages are shortened so that the memory fits
observation
limits that      `question_tokens` 695,                    none: only `context_tokens` limits a context,
are not set      `response_tokens` 6,024                   its prompt included

`response_tokens` counts a context's tokens after its prompt, as the original does; `context_tokens` limits it as well,
so it must leave room for the prompt. The original leaves longer questions out of its training data. A workflow gets one
question and cannot replace it, so it cuts the question at `question_tokens`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actor.chat.chatml import ChatRendering
from actor.chat.fit_observation import fit_observation
from actor.chat.rendering import Answer, BadCall, Malformed, Rendering, Result, ToolCall, ToolCalls
from actor.chat.tokenizer import Tokenizer
from actor.chat.toy import ToyRendering
from actor.episode import Episode
from actor.session import BudgetExceeded, Generation, Session
from actor.tools.tool import Tool
from actor.workflows.memsearcher_options import MemSearcherOptions
from actor.workflows.workflow import Workflow
from protocol.errors import ConfigError
from protocol.types import Edge, Question, Status

# Further calls of a turn get an error, so that a policy cannot overload the retriever.
MAX_CALLS = 8
_PAPER_TOP_N = 10
# Placeholder for a memory when the tokens around it are counted; the text around a memory never contains it.
_PROBE = "\N{WHITE SQUARE}"


class MemSearcher(Workflow):
    """The workflow memsearcher. It calls the tool `search`, or the tools that `workflow.tools` names."""

    Options = MemSearcherOptions
    options: MemSearcherOptions
    tool_names = ("search",)

    def __init__(self, options: MemSearcherOptions, *, tools: Mapping[str, Tool], context_tokens: int) -> None:
        """Raises: ConfigError if an action and a memory do not fit into a context, or there is no tool."""
        super().__init__(options, tools=tools, context_tokens=context_tokens)
        if options.action_tokens + options.memory_tokens >= context_tokens:
            raise ConfigError(
                "workflow.action_tokens + workflow.memory_tokens must be < workflow.context_tokens = "
                f"{context_tokens}, got {options.action_tokens} + {options.memory_tokens}: raise context_tokens, which "
                "holds the prompt, an action, an observation and a memory"
            )
        limit = options.response_limit
        if limit is not None and options.action_tokens + options.memory_tokens >= limit:
            raise ConfigError(
                f"workflow.response_tokens must be > workflow.action_tokens + workflow.memory_tokens = "
                f"{options.action_tokens} + {options.memory_tokens}, got {limit}: a context holds an action, an "
                "observation and a memory after its prompt"
            )
        if not tools:
            raise ConfigError("workflow.tools must name at least one tool for memsearcher, got none")
        self.functions = {tool.schema["name"]: tool for tool in tools.values()}
        self.rendering: Rendering = (
            ChatRendering(tools=[tool.schema for tool in tools.values()], fidelity=options.fidelity)
            if options.rendering == "chat"
            else ToyRendering(tool_name=next(iter(self.functions)))
        )

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises: DataError if the tokenizer lacks the end token of the rendering."""
        tokenizer.token_id(self.rendering.end_token)

    def first_prompt(self, question: Question) -> str:
        return self.rendering.prompt(question.text, "")

    async def run(self, question: Question, session: Session) -> Episode:
        return await _Run(workflow=self, question=question, session=session).run()


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a trajectory: its status, reason and answer."""

    status: Status
    reason: str = ""
    answer: str | None = None


class _Run:
    """One episode."""

    def __init__(self, *, workflow: MemSearcher, question: Question, session: Session) -> None:
        self._options = workflow.options
        self._rendering = workflow.rendering
        self._functions = workflow.functions
        self._question = question
        self._session = session
        self._mended = self._options.fidelity == "mended"
        self._truncates = self._mended and self._options.memory_overflow == "truncate"
        self._stop = (session.tokenizer.token_id(self._rendering.end_token),)
        self._memories: list[str] = []
        self._fault = ""
        self._counts: Counter[str] = Counter(
            num_searches=0,
            num_bad_calls=0,
            num_shortened_observations=0,
            num_truncated_memories=0,
            num_truncated_questions=0,
        )
        self._reserved = 0
        self._memory_limit = self._options.action_tokens
        if self._mended:
            self._memory_limit = self._options.memory_tokens + frame_tokens(self._rendering, session.tokenizer)

    async def run(self) -> Episode:
        end, memory, num_turns = None, "", self._options.max_turns
        question = self._cut(self._question.text)
        try:
            for turn in range(num_turns):
                edge = Edge.START if turn == 0 else Edge.MEMORY_RESET
                self._session.open_context(self._rendering.prompt(question, memory), turn=turn, edge=edge)
                limit = self._options.response_limit
                self._reserved = 0 if limit is None else max(0, self._session.room - limit)
                outcome = await self._turn(is_last=turn + 1 == num_turns)
                self._session.close_context()
                if isinstance(outcome, _End):
                    end = outcome
                    break
                memory = outcome
                self._memories.append(memory)
        except BudgetExceeded as error:
            end = _End(Status.OVER_BUDGET, str(error))
        assert end is not None  # the last turn always returns an _End
        if self._session.is_open:
            self._session.close_context()
        if end.answer is not None:
            fault = self._fault if self._mended else self._rendering.format_fault(self._session.transcripts()[-1])
            end = replace(end, status=Status.FORMAT_ERROR if fault else Status.COMPLETED, reason=fault)
        return Episode(
            status=end.status,
            answer=end.answer,
            reason=end.reason,
            memories=tuple(self._memories),
            stats={name: float(count) for name, count in self._counts.items()},
        )

    def _cut(self, question: str) -> str:
        """The question, at most `question_tokens` of it."""
        limit = self._options.question_limit
        kept = question if limit is None else self._session.tokenizer.truncate(question, limit)
        self._counts.update(num_truncated_questions=int(kept != question))
        return kept

    @property
    def _room(self) -> int:
        """How many more tokens the open context can hold, by `context_tokens` and by `response_tokens`."""
        return self._session.room - self._reserved

    async def _generate(self, max_new_tokens: int) -> Generation:
        """Raises: BudgetExceeded if the open context is full."""
        if self._reserved > 0 and self._room < 1:
            limit = self._options.response_limit
            raise BudgetExceeded(f"a context must have at most workflow.response_tokens = {limit} after its prompt")
        return await self._session.generate(min(max_new_tokens, max(1, self._room)), self._stop)

    async def _turn(self, *, is_last: bool) -> str | _End:
        """Runs one turn in the open context. Returns the next turn's memory, or the trajectory's end."""
        generation = await self._generate(self._options.action_tokens)
        if (stopped := _end_if_illegal_stop(generation)) is not None:
            return stopped
        if generation.finish == "length":
            return _End(Status.OVER_BUDGET, f"an action was cut off at {len(generation.token_ids)} tokens")
        match self._rendering.parse_action(generation.text):
            case Malformed(reason):
                return _End(Status.FORMAT_ERROR, reason)
            case Answer(text, fault):
                self._fault = self._fault or fault
                return _End(Status.COMPLETED, answer=text)
            case ToolCalls() if is_last:
                return _End(Status.OVER_BUDGET, f"no answer in {self._options.max_turns} turns")
            case ToolCalls(calls, fault):
                self._fault = self._fault or fault
                return await self._observe(calls) or await self._remember()

    async def _observe(self, calls: Sequence[ToolCall | BadCall]) -> _End | None:
        """Carries out the calls and appends the observation. Returns the trajectory's end if it does not fit."""
        results = await asyncio.gather(*(self._carry_out(i, call) for i, call in enumerate(calls)))
        num_bad = sum(isinstance(result.call, BadCall) or bool(result.observation.error) for result in results)
        self._counts.update(num_searches=len(results) - num_bad, num_bad_calls=num_bad)
        if not self._mended:
            observation = self._session.tokenizer.encode(self._rendering.observation(results))
            fitted = (observation, False) if len(observation) < self._room else None
        else:
            room = self._room - self._memory_limit
            fitted = fit_observation(self._rendering, self._session.tokenizer, results, room)
        if fitted is None:
            return _End(Status.OVER_BUDGET, f"an observation does not fit into {self._room} tokens of room")
        observation, shortened = fitted
        self._counts.update(num_shortened_observations=int(shortened))
        self._session.append(observation)
        return None

    async def _carry_out(self, index: int, call: ToolCall | BadCall) -> Result:
        if isinstance(call, BadCall):
            return Result(call)
        if index >= MAX_CALLS:
            return Result(BadCall(f"more than {MAX_CALLS} tool calls"))
        arguments = call.arguments if self._mended else {"top_n": _PAPER_TOP_N, **call.arguments}
        return Result(call, await self._session.call(self._functions[call.name], arguments))

    async def _remember(self) -> str | _End:
        """Samples a memory. Returns it within its token limit, or the trajectory's end."""
        generation = await self._generate(self._memory_limit)
        if (stopped := _end_if_illegal_stop(generation)) is not None:
            return stopped
        cut_off = generation.finish == "length"
        if cut_off and not self._truncates:
            return _End(Status.OVER_BUDGET, f"a memory was cut off at {len(generation.token_ids)} tokens")
        memory = self._rendering.parse_memory(generation.text, truncated=cut_off)
        if memory is None:
            status = Status.OVER_BUDGET if cut_off else Status.FORMAT_ERROR
            return _End(status, "the memory is missing, empty or malformed")
        limit = self._options.memory_tokens
        kept = self._session.tokenizer.truncate(memory, limit).strip()
        if kept != memory and not self._truncates:
            return _End(Status.OVER_BUDGET, f"a memory must have at most {limit} tokens, this one has more")
        self._counts.update(num_truncated_memories=int(cut_off or kept != memory))
        return kept or _End(Status.FORMAT_ERROR, "a truncated memory is empty")


def frame_tokens(rendering: Rendering, tokenizer: Tokenizer) -> int:
    """The number of tokens around a memory in the piece that the policy writes, end token included.

    The text before and the text after are encoded separately: joined, they could merge into fewer tokens.
    """
    before, _, after = rendering.write_memory(_PROBE).partition(_PROBE)
    return len(tokenizer.encode(before)) + len(tokenizer.encode(after))


def _end_if_illegal_stop(generation: Generation) -> _End | None:
    if generation.finish != "illegal_stop":
        return None
    return _End(Status.FORMAT_ERROR, f"stopped at token {generation.token_ids[-1]}, which is not the end token")
