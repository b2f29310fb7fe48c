"""MemSearcher's format rules (arXiv 2511.02805): reads the boxed answer and checks the text of a context.

The text has ChatML markers. A response is the text between `<|im_start|>assistant` and `<|im_end|>`; text without the
end marker is not a response.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import orjson

_RESPONSE = re.compile(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_BOX = "\\boxed{"


@dataclass(frozen=True, slots=True)
class FormatCheck:
    """`reason`: the rule that the text violates; None if it is valid. `boxed`: the answer of a valid text."""

    reason: str | None
    boxed: str | None = None

    @property
    def valid(self) -> bool:
        return self.reason is None


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{…}`, with balanced braces; None if there is none or it is not closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 0
    for at in range(start + len(_BOX) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len(_BOX) : at]
    return None


def check_chat(text: str) -> FormatCheck:
    """Checks the text of a whole context by the paper's rules.

    Thought and tool JSON are checked in the first response only and the box in the last only, as in the original.
    Deviation: a box that is never closed counts as missing (the original accepts it, then crashes).
    """
    responses = _RESPONSE.findall(text)
    if not responses:
        return FormatCheck("no assistant response found")
    reason = _fault_of_first(responses[0])
    if reason is not None:
        return FormatCheck(reason)
    boxed = last_boxed(responses[-1])
    if boxed is None:
        return FormatCheck("the last response is missing \\boxed")
    return FormatCheck(None, boxed)


def _fault_of_first(response: str) -> str | None:
    for tag, name in (("think", "think"), ("tool_call", "tool_call")):
        opened, closed = response.count(f"<{tag}>"), response.count(f"</{tag}>")
        if opened != closed:
            return f"<{tag}> and </{tag}> are not paired: {name}={opened}, {name}_end={closed}"
    if "<think>" not in response:
        return "missing <think> tag"
    for call in _TOOL_CALL.findall(response):
        fault = _fault_of_call(call)
        if fault is not None:
            return fault
    return None


def _fault_of_call(text: str) -> str | None:
    try:
        call = orjson.loads(text)
    except orjson.JSONDecodeError:
        return f"tool_call is not a valid json: {text}"
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        return "tool_call is missing name or arguments field"
    return None
