"""The toy world's short texts for the toy tokenizer: single words, no sentences.

prompt        <question> what is zuka founder birthplace country ? <memory> none <think>
policy        zuka founder <search> zuka founder <end>
observation   <information> zuka founder kami . … <memory>
policy        zuka founder kami <end>
… and in the last turn
policy        country ? <answer> peru <end>
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from actor.chat.rendering import Action, Answer, Malformed, Result, ToolCall, ToolCalls
from protocol.types import Passage

_EMPTY = "none"


class ToyRendering:
    """Implements `Rendering`. Words and tags are separated by one space. `tool_name`: what <search> calls."""

    end_token = "<end>"

    def __init__(self, *, tool_name: str = "search") -> None:
        self._tool_name = tool_name

    def prompt(self, question: str, memory: str) -> str:
        return f"<question> {question} <memory> {memory or _EMPTY} <think>"

    def parse_action(self, text: str) -> Action:
        words = self._words(text)
        tags = [word for word in words if word.startswith("<")]
        if tags not in (["<search>"], ["<answer>"]):
            return Malformed(f"an action has one of <search> and <answer>, got {' '.join(tags) or 'no tag'}")
        argument = " ".join(words[words.index(tags[0]) + 1 :])
        if not argument:
            return Malformed(f"nothing follows {tags[0]}")
        if tags[0] == "<answer>":
            return Answer(argument)
        return ToolCalls((ToolCall(self._tool_name, {"query": argument}),))

    def observation(self, results: Sequence[Result]) -> str:
        passages = [p.text for result in results for p in shuffled(result)]
        return " ".join(["<information>", *(passages or [f"{_EMPTY} ."]), "<memory>"])

    def parse_memory(self, text: str, *, truncated: bool = False) -> str | None:
        words = self._words(text)
        if not words or any(word.startswith("<") for word in words):
            return None
        return " ".join(words)

    def format_fault(self, transcript: str) -> str:
        """Always empty: the paper has no format rules for these texts."""
        return ""

    def write_action_search(self, thought: str, queries: Sequence[str]) -> str:
        """Raises: ValueError unless there is exactly one query: an action of the toy has one search."""
        (query,) = queries
        return f"{thought} <search> {query} <end>"

    def write_answer(self, thought: str, answer: str) -> str:
        return f"{thought} <answer> {answer} <end>"

    def write_memory(self, memory: str) -> str:
        return f"{memory} <end>"

    def _words(self, text: str) -> list[str]:
        words = text.split()
        return words[:-1] if words and words[-1] == self.end_token else words


def shuffled(result: Result) -> list[Passage]:
    """Returns the passages in a pseudo-random order given by the query and their ids: a position predicts nothing."""
    query = result.call.arguments.get("query", "") if isinstance(result.call, ToolCall) else ""
    return sorted(
        result.observation.passages, key=lambda p: blake2b(f"{query}\0{p.id}".encode(), digest_size=8).digest()
    )
