r"""A demonstrator that knows which passages hold the answer, and writes only what can be read in its context.

    memory empty   look up the question itself, to its end or to what JSON would have to escape
    observation    memory = the old lines and, for each wanted passage, `- Title: the sentence that leads on`
    memory         look up a wanted title that memory or question names … until none is missing: \boxed{answer}

What is copied follows a space, as in the text that it is from (parsers strip it): a word after a space is another token
than one after a quote or a brace, and a model that copies tokens could not begin.

Where that does not lead to the answer (a passage is not found, a name or the answer is spelled differently), the
script raises `OffScript`, and the episode is no demonstration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actor.workflows.rendering import Rendering
from protocol.errors import PalimpsestError

MAX_LINE_CHARS = 200
_BULLET = "- "
_STATE = re.compile(r"<question>\n(.*?)\n</question>\n<memory>\n(.*?)\n?</memory>", re.DOTALL)
_PASSAGE = re.compile(r"^\[\d+\] (.*)$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"]{2}[.!?]) +(?=[A-Z\"])")
_UNTITLED = re.compile(r" \([^()]*\)$")
_QUERY_END = re.compile(r'["\\?]')
FREE_ANSWERS = ("yes", "no")
# Thoughts without names: what a small model samples most is what goes wrong most.
NOTHING_YET = "The memory is empty. I look up the question."
MORE = "The memory does not have all of it. I look up what is missing."
ENOUGH = "The memory has all that is needed."


class OffScript(PalimpsestError):
    """The script has no next step that could be learned."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question with the titles of the passages that answer it, in the order in which one leads to the next."""

    id: str
    question: str
    answers: tuple[str, ...]
    titles: tuple[str, ...]


class GoldScript:
    """Implements `Script` for one episode."""

    def __init__(self, *, example: Example, rendering: Rendering) -> None:
        self._example = example
        self._rendering = rendering
        self._wanted: tuple[str, ...] = ()

    def write(self, context: str) -> str:
        question, memory = _STATE.findall(context)[0]
        if context.endswith("<think>"):
            return self._act(question, memory.strip())
        return self._rendering.write_memory(self._remember(context, memory.strip()))

    def _act(self, question: str, memory: str) -> str:
        known = {line.removeprefix(_BULLET).partition(": ")[0] for line in memory.splitlines()}
        missing = [title for title in self._example.titles if title not in known]
        if not missing:
            return self._rendering.write_answer(ENOUGH, f" {self._answer(question, memory)}")
        if not memory:
            self._wanted, query = tuple(missing), _QUERY_END.split(question)[0].rstrip()
        else:
            self._wanted, query = self._next(missing, f"{question}\n{memory}")
        if not query:
            raise OffScript("the question begins with a quotation")
        return self._rendering.write_action_search(MORE if memory else NOTHING_YET, [query])

    def _next(self, missing: Sequence[str], text: str) -> tuple[tuple[str, ...], str]:
        """The first of the missing titles that `text` names, and a query for it."""
        for title in missing:
            if seen := spelling(title, text):
                return (title,), f" {seen}"
        raise OffScript("nothing names a missing title")

    def _remember(self, context: str, memory: str) -> str:
        lines = memory.splitlines()
        for passage in _PASSAGE.findall(context):
            title = next((title for title in self._wanted if passage.startswith(f"{title}: ")), None)
            if title is not None and not any(line.startswith(f"{_BULLET}{title}: ") for line in lines):
                lines.append(f"{_BULLET}{title}: {self._sentence(passage.removeprefix(f'{title}: '), title)}")
        if len(lines) == len(memory.splitlines()):
            raise OffScript("no wanted passage was found")
        return "\n".join(lines)

    def _sentence(self, text: str, title: str) -> str:
        """The sentence that answers, else the one that names another passage, else the first."""
        others = [other for other in self._example.titles if other != title]
        sentences = [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]
        if not sentences:
            raise OffScript("a passage was cut to nothing")

        def worth(sentence: str) -> tuple[bool, bool]:
            return _contains_any(sentence, self._example.answers), any(spelling(other, sentence) for other in others)

        best = max(sentences, key=worth)
        if len(best) > MAX_LINE_CHARS:
            raise OffScript("a sentence is too long")
        return best

    def _answer(self, question: str, memory: str) -> str:
        for answer in self._example.answers:
            if answer.lower() in FREE_ANSWERS:
                return answer
            if seen := spelling(answer, f"{memory}\n{question}"):
                return seen
        raise OffScript("the answer cannot be read in memory or question")


def spelling(name: str, text: str) -> str | None:
    """`name` as `text` writes it, whatever the case, else without what stands in brackets at its end."""
    for form in (name, _UNTITLED.sub("", name)):
        if match := re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text, re.IGNORECASE):
            return match[0]
    return None


def _contains_any(text: str, names: Sequence[str]) -> bool:
    return any(spelling(name, text) is not None for name in names)
