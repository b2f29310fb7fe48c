r"""A scripted demonstrator that writes short texts, made only of words in its context.

    memory empty   search for the first words of the question
    observation    memory = `- Title: first words of the text`, of a passage that holds the answer, else of the first
    memory         \boxed{answer}: the gold answer if the context has it, else the title

Its texts are short because a small model's chance of an error grows with each token. Copied words follow a space, as in
their source (parsers strip it): a word has another token after a space than after a quote or a brace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from actor.chat.rendering import Rendering
from protocol.errors import PalimpsestError

MAX_QUERY_WORDS = 5
MAX_MEMORY_WORDS = 5
_BULLET = "- "
_STATE = re.compile(r"<question>\n(.*?)\n</question>\n<memory>\n(.*?)\n?</memory>", re.DOTALL)
_PASSAGE = re.compile(r"^\[\d+\] (.*)$", re.MULTILINE)
_PARENTHESES_AT_END = re.compile(r" \([^()]*\)$")
FREE_ANSWERS = ("yes", "no")
# Thoughts contain no names, because a small model copies names with errors.
NOTHING_YET = "The memory is empty."
ENOUGH = "That is enough."


class OffScript(PalimpsestError):
    """The script has no correct next step, so the episode is not used for training."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question with the titles of the passages that answer it, in the order of the reasoning."""

    id: str
    question: str
    answers: tuple[str, ...]
    titles: tuple[str, ...]


class GoldScript:
    """Implements `Script` for one episode."""

    def __init__(self, *, example: Example, rendering: Rendering) -> None:
        self._example = example
        self._rendering = rendering

    def write(self, context: str) -> str:
        question, memory = _STATE.findall(context)[0]
        if context.endswith("<think>"):
            return self._act(question, memory.strip())
        return self._rendering.write_memory(self._remember(context))

    def _act(self, question: str, memory: str) -> str:
        if memory:
            return self._rendering.write_answer(ENOUGH, f" {self._answer(question, memory)}")
        query = _first_words(question, MAX_QUERY_WORDS)
        if '"' in query or "\\" in query:
            raise OffScript("a query needs escapes")
        return self._rendering.write_action_search(NOTHING_YET, [query])

    def _remember(self, context: str) -> str:
        """The memory: first words of the first passage with a wanted title, else of the first passage."""
        passages = _PASSAGE.findall(context)
        if not passages:
            raise OffScript("nothing was found")
        wanted = [p for p in passages if any(p.startswith(f"{title}: ") for title in self._example.titles)]
        title, _, text = (wanted or passages)[0].partition(": ")
        line = f"{_BULLET}{title}: {_first_words(text, MAX_MEMORY_WORDS)}"
        if not text:
            raise OffScript("a passage was truncated to nothing")
        return line

    def _answer(self, question: str, memory: str) -> str:
        """A gold answer if memory or question has it, else the last title in the memory."""
        for answer in self._example.answers:
            if answer.lower() in FREE_ANSWERS:
                return answer
            if seen := find_spelling(answer, f"{memory}\n{question}"):
                return seen
        return memory.splitlines()[-1].removeprefix(_BULLET).partition(": ")[0]


def _first_words(text: str, num: int) -> str:
    return " ".join(text.split()[:num]).rstrip("?.,;:")


def find_spelling(name: str, text: str) -> str | None:
    """`name` as `text` spells it, ignoring case; else without the brackets at its end; None if `text` has neither."""
    for form in (name, _PARENTHESES_AT_END.sub("", name)):
        if match := re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text, re.IGNORECASE):
            return match[0]
    return None
