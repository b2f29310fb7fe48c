"""MemSearcher (arXiv 2511.02805): a memory that is written anew each turn is all that survives it.

    turn k, one context:  prompt(question, memory_k) ─► action ──answer──────────────► the end
                                                          │ searches, in one request
                                                          ▼
                                                     observation ─► memory_k+1 ─► close; turn k+1

How a trajectory ends (trained in all cases but FAILED; the reward function decides what it is worth):

    COMPLETED     an action with an answer and no tool call
    FORMAT_ERROR  neither; tool tags that do not pair; a memory that is missing or empty; a stop at a foreign token;
                  or an answer where a format rule was broken (which rules: `format` below)
    OVER_BUDGET   the last turn's action is another search (it is not run); an action cut off at `action_tokens`;
                  no room in the context; a memory above its limit, where that is not truncated
    FAILED        an engine or the retriever failed

A tool call that cannot be read is answered with an error in the observation, and the trajectory goes on.

fidelity         paper                                     mended
memory limit     generation stops at `action_tokens`,      the generation has room for `memory_tokens` and its tags;
                 and stopping there is the end             beyond: `memory_overflow` truncates it or fails
format           the rules of `check_chat` on the last     every action of every turn: thought and tool tags pair
                 context: tags counted, not paired; the    and alternate, tool JSON can be read; an answer after
                 JSON of earlier turns is not looked at    an action that broke a rule is no COMPLETED
top_n left out   10 passages                               `top_n`
a long context   the end                                   passages are shortened so that the memory fits
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from actor.chat.fit_observation import fit_observation
from actor.chat.rendering import Answer, BadCall, Malformed, Rendering, Result, Search, Searches
from actor.chat.tokenizer import Tokenizer
from actor.session import BudgetExceeded, Generation, Session
from actor.tools.search_client import Searcher, SearchFailed
from actor.workflows.workflow import Episode
from protocol.config import WorkflowConfig
from protocol.errors import EngineError
from protocol.types import Edge, Passage, Question, Status

# More calls in a turn are answered with an error: a policy must not be able to flood the retriever.
MAX_SEARCHES = 8
# The most passages that the policy can ask for with `top_n`, unless the config's own are more.
MAX_TOP_N = 20
_PAPER_TOP_N = 10
# Stands for a memory where the tokens of its frame are counted; no frame has it.
_PROBE = "\N{WHITE SQUARE}"

_Search = Callable[[Sequence[Search | BadCall], str], Awaitable[list[Result]]]


@dataclass(frozen=True, slots=True)
class _End:
    """The trajectory is over."""

    status: Status
    reason: str = ""
    answer: str | None = None


class MemSearcher:
    """Implements `Workflow`. `collection` of the retriever: a question's metadata may name its own.

    The session's `max_context_tokens` is the context budget.
    """

    def __init__(self, *, config: WorkflowConfig, rendering: Rendering, search: Searcher, collection: str = "") -> None:
        self._config = config
        self._rendering = rendering
        self._search = search
        self._collection = collection

    async def run(self, question: Question, session: Session) -> Episode:
        run = _Run(
            config=self._config,
            rendering=self._rendering,
            search=self.searches,
            collection=question.metadata.get("collection", self._collection),
            question=question,
            session=session,
        )
        return await run.run()

    async def searches(self, calls: Sequence[Search | BadCall], collection: str) -> list[Result]:
        """Runs the calls in as few requests as there are different `top_n`. Raises: SearchFailed."""
        allowed = [
            call
            if isinstance(call, BadCall) or index < MAX_SEARCHES
            else BadCall(f"more than {MAX_SEARCHES} tool calls")
            for index, call in enumerate(calls)
        ]
        wanted: dict[int, list[str]] = {}
        for call in allowed:
            if isinstance(call, Search):
                wanted.setdefault(self._top_n(call), []).append(call.query)
        answers = await asyncio.gather(
            *(self._search.search(queries, top_n=n, collection=collection) for n, queries in wanted.items())
        )
        found: dict[tuple[int, str], list[Passage]] = {
            (n, query): passages
            for (n, queries), answer in zip(wanted.items(), answers, strict=True)
            for query, passages in zip(queries, answer, strict=True)
        }
        return [
            Result(call, tuple(found[self._top_n(call), call.query])) if isinstance(call, Search) else Result(call)
            for call in allowed
        ]

    def _top_n(self, call: Search) -> int:
        if call.top_n is None:
            return self._config.top_n if self._config.fidelity == "mended" else _PAPER_TOP_N
        return min(call.top_n, max(MAX_TOP_N, self._config.top_n))


class _Run:
    """One episode."""

    def __init__(
        self,
        *,
        config: WorkflowConfig,
        rendering: Rendering,
        search: _Search,
        collection: str,
        question: Question,
        session: Session,
    ) -> None:
        self._config = config
        self._rendering = rendering
        self._search = search
        self._collection = collection
        self._question = question
        self._session = session
        self._mended = config.fidelity == "mended"
        self._truncates = self._mended and config.memory_overflow == "truncate"
        self._stop = (session.tokenizer.token_id(rendering.end_token),)
        self._memories: list[str] = []
        self._fault = ""
        self._counts: Counter[str] = Counter()
        self._memory_limit = config.action_tokens
        if self._mended:
            self._memory_limit = config.memory_tokens + frame_tokens(rendering, session.tokenizer)

    async def run(self) -> Episode:
        try:
            end = await self._turns()
        except BudgetExceeded as error:
            end = _End(Status.OVER_BUDGET, str(error))
        except (EngineError, SearchFailed) as error:
            end = _End(Status.FAILED, f"{type(error).__name__}: {error}")
        if self._session.is_open:
            self._session.close_context()
        transcripts = self._session.transcripts()
        if end.answer is not None:
            fault = self._fault if self._mended else self._rendering.format_fault(transcripts[-1])
            end = replace(end, status=Status.FORMAT_ERROR if fault else Status.COMPLETED, reason=fault)
        return Episode(
            status=end.status,
            answer=end.answer,
            reason=end.reason,
            transcripts=transcripts,
            memories=tuple(self._memories),
            stats=self._stats(),
        )

    async def _turns(self) -> _End:
        memory = ""
        for turn in range(self._config.max_turns):
            edge = Edge.START if turn == 0 else Edge.MEMORY_RESET
            prompt = self._rendering.prompt(self._question.text, memory)
            self._session.open_context(prompt, turn=turn, edge=edge)
            outcome = await self._turn(is_last=turn + 1 == self._config.max_turns)
            self._session.close_context()
            if isinstance(outcome, _End):
                return outcome
            memory = outcome
            self._memories.append(memory)
        raise AssertionError("WorkflowConfig.max_turns is >= 1, and the last turn ends the trajectory")

    async def _turn(self, *, is_last: bool) -> str | _End:
        """The next turn's memory, or the end."""
        generation = await self._session.generate(self._config.action_tokens, self._stop)
        if (stopped := _illegal(generation)) is not None:
            return stopped
        if generation.finish == "length":
            return _End(Status.OVER_BUDGET, f"an action of {len(generation.token_ids)} tokens did not end")
        match self._rendering.parse_action(generation.text):
            case Malformed(reason):
                return _End(Status.FORMAT_ERROR, reason)
            case Answer(text, fault):
                self._fault = self._fault or fault
                return _End(Status.COMPLETED, answer=text)
            case Searches() if is_last:
                return _End(Status.OVER_BUDGET, f"no answer in {self._config.max_turns} turns")
            case Searches(calls, fault):
                self._fault = self._fault or fault
                return await self._observe(calls) or await self._remember()

    async def _observe(self, calls: Sequence[Search | BadCall]) -> _End | None:
        results = await self._search(calls, self._collection)
        num_bad = sum(isinstance(result.call, BadCall) for result in results)
        self._counts.update(num_searches=len(results) - num_bad, num_bad_calls=num_bad)
        if not self._mended:
            observation = self._session.tokenizer.encode(self._rendering.observation(results))
            fitted = (observation, False) if len(observation) < self._session.room else None
        else:
            room = self._session.room - self._memory_limit
            fitted = fit_observation(self._rendering, self._session.tokenizer, results, room)
        if fitted is None:
            return _End(Status.OVER_BUDGET, f"an observation does not fit into {self._session.room} tokens of room")
        observation, shortened = fitted
        self._counts.update(num_shortened_observations=int(shortened))
        self._session.append(observation)
        return None

    async def _remember(self) -> str | _End:
        """The policy's new memory, held to its limit."""
        generation = await self._session.generate(self._memory_limit, self._stop)
        if (stopped := _illegal(generation)) is not None:
            return stopped
        cut_off = generation.finish == "length"
        if cut_off and not self._truncates:
            return _End(Status.OVER_BUDGET, f"a memory of {len(generation.token_ids)} tokens did not end")
        memory = self._rendering.parse_memory(generation.text, truncated=cut_off)
        if memory is None:
            status = Status.OVER_BUDGET if cut_off else Status.FORMAT_ERROR
            return _End(status, "the memory is missing, empty or malformed")
        limit = self._config.memory_tokens
        kept = self._session.tokenizer.truncate(memory, limit).strip()
        if kept != memory and not self._truncates:
            return _End(Status.OVER_BUDGET, f"a memory has at most {limit} tokens, this one has more")
        self._counts.update(num_truncated_memories=int(cut_off or kept != memory))
        return kept or _End(Status.FORMAT_ERROR, "nothing is left of a truncated memory")

    def _stats(self) -> dict[str, float]:
        session = self._session
        lengths = [len(context) for context in session.contexts]
        names = ("num_searches", "num_bad_calls", "num_shortened_observations", "num_truncated_memories")
        return {
            "num_turns": float(len(lengths)),
            "num_generations": float(session.num_generations),
            "num_prompt_tokens": float(session.num_prompt_tokens),
            "num_cached_tokens": float(session.num_cached_tokens),
            "num_generated_tokens": float(session.num_generated_tokens),
            "peak_context_tokens": float(max(lengths, default=0)),
            **{name: float(self._counts[name]) for name in names},
        }


def frame_tokens(rendering: Rendering, tokenizer: Tokenizer) -> int:
    """How many tokens stand around a memory in the piece that writes it, its end token included.

    What is before and after is counted apart: an empty memory would let the two merge into fewer tokens.
    """
    before, _, after = rendering.write_memory(_PROBE).partition(_PROBE)
    return len(tokenizer.encode(before)) + len(tokenizer.encode(after))


def _illegal(generation: Generation) -> _End | None:
    if generation.finish != "illegal_stop":
        return None
    return _End(Status.FORMAT_ERROR, f"stopped at token {generation.token_ids[-1]}, which does not end a piece")
