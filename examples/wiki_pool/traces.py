"""Records demonstrations on the training questions: real workflow, prompt and index; the script is the policy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from script import Example, GoldScript, OffScript
from search_tool import search_tool

from actor.chat.tokenizer import Tokenizer
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.extensions import WORKFLOWS
from actor.session import Session
from actor.tools.tool import Searcher
from actor.workflows.demonstrations import ScriptedGenerator
from actor.workflows.memsearcher import MemSearcher
from protocol.config import WorkflowConfig
from protocol.errors import DataError
from protocol.types import Context, Passage, Question, Status
from retriever.search import Query
from retriever.search import Searcher as IndexSearcher


class LocalSearch:
    """Implements the actor's `Searcher` on an index in this process; returns what the service returns."""

    def __init__(self, searcher: IndexSearcher) -> None:
        self._searcher = searcher

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        found = self._searcher.search([Query(query, top_n, collection) for query in queries])
        return [[Passage(p.id, p.title, p.text, p.score) for p in passages] for passages in found]


@dataclass(slots=True)
class Traces:
    """contexts: of the completed episodes, in order. refused: the number of other episodes by reason."""

    contexts: list[Context] = field(default_factory=list)
    num_episodes: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def read_examples(path: Path) -> list[Example]:
    """Raises: DataError if the file cannot be read or a row lacks a field."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [
            Example(row["id"], row["question"], tuple(row["answers"]), tuple(dict.fromkeys(row["gold_titles"])))
            for row in rows
        ]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error!r}; a row needs id, question, answers and gold_titles") from error


async def record(
    examples: Sequence[Example],
    *,
    search: Searcher,
    tokenizer: Tokenizer,
    config: WorkflowConfig,
    top_n: int,
    on_progress: Callable[[int, int], None],
) -> Traces:
    """Runs an episode per question; keeps those that complete with at least two contexts."""
    workflow: MemSearcher = WORKFLOWS.create(
        config,
        base_dir=None,
        tools={"search": search_tool(top_n, search)},
        context_tokens=config.context_tokens,
    )
    traces = Traces()
    for done, example in enumerate(examples, start=1):
        question = Question(example.id, example.question, example.answers)
        script = GoldScript(example=example, rendering=workflow.rendering)
        session = Session(
            pool=ScriptedGenerator(script=script, tokenizer=tokenizer),
            tokenizer=tokenizer,
            sampling=SamplingParams(),
            run_id=None,
            max_context_tokens=config.context_tokens,
            question=question,
        )
        try:
            episode = await workflow.run(question, session)
            _check(episode, num_contexts=len(session.contexts))
        except OffScript as error:
            traces.refused[str(error)] += 1
        else:
            traces.contexts += session.contexts
            traces.num_episodes += 1
        on_progress(done, len(examples))
    return traces


def _check(episode: Episode, *, num_contexts: int) -> None:
    """Raises: OffScript if the episode did not complete, has one context, or has a truncated memory."""
    if episode.status is not Status.COMPLETED:
        raise OffScript(f"it ended as {episode.status.value}")
    if num_contexts < 2 or episode.stats["num_truncated_memories"]:
        raise OffScript("a memory is missing or above its limit")
