"""Demonstrations on the training questions: the real workflow, prompt and retriever, played by the script."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from script import Example, GoldScript, OffScript

from actor.chat.chatml import ChatRendering
from actor.chat.tokenizer import Tokenizer
from actor.engines.sampling import SamplingParams
from actor.evaluation.demonstrations import ScriptedGenerator
from actor.session import Session
from actor.tools.search_client import Searcher
from actor.workflows.memsearcher import MemSearcher
from actor.workflows.workflow import Episode
from protocol.config import WorkflowConfig
from protocol.errors import DataError
from protocol.types import Context, Passage, Question, Status
from retriever.search import Query
from retriever.search import Searcher as IndexSearcher


class LocalSearch:
    """Implements the actor's `Searcher` on an index in this process: what the service would answer."""

    def __init__(self, searcher: IndexSearcher) -> None:
        self._searcher = searcher

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        found = self._searcher.search([Query(query, top_n, collection) for query in queries])
        return [[Passage(p.id, p.title, p.text, p.score) for p in passages] for passages in found]


@dataclass(slots=True)
class Traces:
    """`contexts` of the episodes that completed, one after another; why the others are none."""

    contexts: list[Context] = field(default_factory=list)
    num_episodes: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def read_examples(path: Path) -> list[Example]:
    """Raises: DataError where a row lacks a field."""
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
    on_progress: Callable[[int, int], None],
) -> Traces:
    """Plays every question; keeps the episodes that complete in two contexts or more."""
    rendering = ChatRendering(fidelity=config.fidelity, top_n=config.top_n)
    workflow = MemSearcher(config=config, rendering=rendering, search=search)
    traces = Traces()
    for done, example in enumerate(examples, start=1):
        script = GoldScript(example=example, rendering=rendering)
        session = Session(
            pool=ScriptedGenerator(script=script, tokenizer=tokenizer),
            tokenizer=tokenizer,
            sampling=SamplingParams(),
            run_id=None,
            max_context_tokens=config.context_tokens,
        )
        try:
            episode = await workflow.run(Question(example.id, example.question, example.answers), session)
            _check(episode)
        except OffScript as error:
            traces.refused[str(error)] += 1
        else:
            traces.contexts += session.contexts
            traces.num_episodes += 1
        on_progress(done, len(examples))
    return traces


def _check(episode: Episode) -> None:
    """Raises: OffScript where the workflow did not let the script come to its end as it is written."""
    if episode.status is not Status.COMPLETED:
        raise OffScript(f"it ended as {episode.status.value}")
    if len(episode.transcripts) < 2 or episode.stats["num_truncated_memories"]:
        raise OffScript("a memory is missing or above its limit")
