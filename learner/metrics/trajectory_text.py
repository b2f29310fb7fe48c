"""Renders a trajectory as Markdown, for TensorBoard's text tab."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence

from protocol.types import Context, Question, Status, Trajectory, TrajectoryGroup

_WIDTH = 110
"""Columns of a line. TensorBoard does not wrap the lines of a code block."""
_MAX_CONTEXTS = 12
_MAX_SEGMENT_CHARS = 4_000
_MAX_NAME_CHARS = 500


def best_and_worst(groups: Sequence[TrajectoryGroup]) -> dict[str, tuple[Question, Trajectory]]:
    """`best` and `worst` by reward of the trajectories that did not fail; empty if all failed. Of equals, the first."""
    counted = [
        (group.question, trajectory)
        for group in groups
        for trajectory in group.trajectories
        if trajectory.status is not Status.FAILED
    ]
    if not counted:
        return {}
    return {
        "best": max(counted, key=lambda each: each[1].reward),
        "worst": min(counted, key=lambda each: each[1].reward),
    }


def render_trajectory(trajectory: Trajectory, *, question: Question, decode: Callable[[list[int]], str]) -> str:
    """Returns Markdown: the question, the result, and every context as code blocks of given and of sampled tokens.

    decode: token ids → text, special tokens included. Long texts and long trajectories are cut, with a note.
    """
    parts = "".join(f", {name} {value:.3f}" for name, value in sorted(trajectory.reward_parts.items()))
    head = [
        _block(
            f"question  {_short(question.text)}",
            f"gold      {_short(' | '.join(question.answers))}",
            f"answer    {_short(trajectory.answer)}",
        ),
        f"**reward {trajectory.reward:.3f}**{_escaped(parts)}; {_escaped(trajectory.status)}; "
        f"{len(trajectory.contexts)} contexts, {trajectory.num_tokens} tokens",
    ]
    contexts = list(enumerate(trajectory.contexts, start=1))
    omitted = len(contexts) - _MAX_CONTEXTS
    if omitted > 0:
        half = _MAX_CONTEXTS // 2
        first, last = contexts[:half], contexts[-half:]
        note = [f"*{omitted} contexts are omitted here.*"]
        return "\n\n".join([*head, *_rendered(first, decode), *note, *_rendered(last, decode)])
    return "\n\n".join([*head, *_rendered(contexts, decode)])


def _rendered(contexts: Sequence[tuple[int, Context]], decode: Callable[[list[int]], str]) -> Iterator[str]:
    for number, context in contexts:
        name = f"{_escaped(context.role)}, {_escaped(context.edge)}"
        yield f"#### Context {number} ({name}, turn {context.turn}, {len(context)} tokens)"
        for title, token_ids in _segments(context):
            yield f"{title}, {len(token_ids)} tokens:"
            yield _block(_short(decode(token_ids), limit=_MAX_SEGMENT_CHARS))


def _segments(context: Context) -> Iterator[tuple[str, list[int]]]:
    """(title, token ids) of the given and the sampled stretches of a context, in order."""
    ids = context.token_ids.tolist()
    at = 0
    for span in context.policy_versions:
        if span.start > at:
            yield ("Observation" if at else "Prompt"), ids[at : span.start]
        yield f"**Sampled by version {span.version}**", ids[span.start : span.end]
        at = span.end
    if at < len(ids):
        yield ("Observation" if at else "Prompt"), ids[at:]


def _block(*texts: str) -> str:
    """A code block of wrapped lines. Its fence is longer than any run of backticks in it."""
    lines = [wrapped for text in texts for line in _printable(text).split("\n") for wrapped in _wrap(line)]
    body = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}\n{body}\n{fence}"


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]


def _printable(text: str) -> str:
    """`text` with control characters, except line breaks, as escape sequences."""
    return "".join(char if char == "\n" or char.isprintable() else repr(char)[1:-1] for char in text)


def _short(text: str, *, limit: int = _MAX_NAME_CHARS) -> str:
    """`text` without its middle if it is longer than `limit` characters, with a note of what was cut."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters are omitted here]\n{text[-half:]}"


def _escaped(text: str) -> str:
    """`text` for Markdown outside of code, on one line."""
    return re.sub(r"([\\`*_\[\]<>#|~!])", r"\\\1", " ".join(_printable(text).split()))
