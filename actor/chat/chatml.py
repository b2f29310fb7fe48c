r"""MemSearcher's texts in ChatML: JSON tool calls, numbered passages, an answer in `\boxed{}`.

    prompt        <|im_start|>system … <|im_end|> <|im_start|>user question, memory … <|im_start|>assistant <think>
    policy        … </think> <tool_call>{"name": …, "arguments": {"query": …}}</tool_call><|im_end|>
    observation   \n<|im_start|>user <tool_response>…</tool_response> … <|im_end|> <|im_start|>assistant
    policy        <memory>…</memory><|im_end|>
    … and in the last turn
    policy        … </think> \boxed{answer}<|im_end|>

The format is that of MemSearcher (arXiv 2511.02805 and its public code). The wording of the prompts is our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from actor.chat.rendering import (
    Action,
    Answer,
    BadCall,
    Fidelity,
    Malformed,
    Result,
    ToolCall,
    ToolCalls,
)
from actor.rewards.format import check_chat, last_boxed
from protocol.types import Passage

_START, _END = "<|im_start|>", "<|im_end|>"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CALL_TAG = re.compile(r"</?tool_call>")
_MEMORY = re.compile(r"<memory>(.*?)</memory>", re.DOTALL)
_CONTROL = re.compile(r"<(?=\||/?(?:think|tools|tool_call|tool_response|memory|question)>)")
_TEMPLATES = ("system", "user", "observation")


class ChatRendering:
    """Implements `Rendering`. `tools` are schemas (`Tool.schema`), at least one.

    With fidelity `paper`, passages are joined with a backslash and an `n` in place of a newline, as in the original.
    """

    end_token = _END

    def __init__(self, *, tools: Sequence[Mapping[str, Any]], fidelity: Fidelity = "mended") -> None:
        folder = files("actor.chat") / "templates"
        sources = {name: (folder / f"{name}.jinja").read_text(encoding="utf-8") for name in _TEMPLATES}
        # The text is not HTML: autoescape would change it. `plain` breaks control tokens in text from outside.
        self._templates = Environment(loader=DictLoader(sources), undefined=StrictUndefined, autoescape=False)
        self._separator = r"\n" if fidelity == "paper" else "\n"
        self._names = tuple(tool["name"] for tool in tools)
        schemas = "\n".join(json.dumps({"type": "function", "function": dict(tool)}) for tool in tools)
        self._system = self._render("system", tools=schemas, tool_name=self._names[0])

    def prompt(self, question: str, memory: str) -> str:
        user = self._render("user", question=plain(question), memory=plain(memory))
        return f"{_turn('system', self._system)}\n{_turn('user', user)}\n{_START}assistant\n<think>"

    def parse_action(self, text: str) -> Action:
        text = text.removesuffix(_END)
        opened, closed = text.count("<tool_call>"), text.count("</tool_call>")
        if opened != closed:
            return Malformed(f"{opened} <tool_call> but {closed} </tool_call>")
        thoughts, ended = text.count("<think>") + 1, text.count("</think>")  # the prompt opens the first one
        fault = "" if thoughts == ended else f"{thoughts} <think> but {ended} </think>"
        if _CALL_TAG.findall(text) != ["<tool_call>", "</tool_call>"] * opened:
            fault = fault or "<tool_call> and </tool_call> do not alternate"
        if bodies := _CALL.findall(text):
            calls = tuple(parse_call(body, names=self._names) for body in bodies)
            broken = next((c.error for c in calls if isinstance(c, BadCall) and c.breaks_format), "")
            return ToolCalls(calls, fault or broken)
        answer = last_boxed(text)
        return Malformed(r"neither a tool call nor \boxed{}") if answer is None else Answer(answer.strip(), fault)

    def observation(self, results: Sequence[Result]) -> str:
        responses = [self._response(result) for result in results]
        user = self._render("observation", responses=responses)
        return f"\n{_turn('user', user)}\n{_START}assistant\n"

    def parse_memory(self, text: str, *, truncated: bool = False) -> str | None:
        text = text.removesuffix(_END)
        if match := _MEMORY.search(text):
            return match[1].strip() or None
        _, opened, rest = text.partition("<memory>")
        return (rest.strip() or None) if truncated and opened else None

    def format_fault(self, transcript: str) -> str:
        return check_chat(transcript).reason or ""

    def write_action_search(self, thought: str, queries: Sequence[str]) -> str:
        calls = (
            json.dumps({"name": self._names[0], "arguments": {"query": query}}, ensure_ascii=False) for query in queries
        )
        tagged = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        return f"\n{thought}\n</think>\n{tagged}{_END}"

    def write_answer(self, thought: str, answer: str) -> str:
        return f"\n{thought}\n</think>\nThe answer is \\boxed{{{answer}}}{_END}"

    def write_memory(self, memory: str) -> str:
        return f"<memory>\n{memory}\n</memory>{_END}"

    def _render(self, name: str, **values: str | list[str]) -> str:
        return self._templates.get_template(name).render(values)

    def _response(self, result: Result) -> str:
        observation = result.observation
        if error := result.call.error if isinstance(result.call, BadCall) else observation.error:
            return plain(f"Error: {error}")
        passages = [_passage(number, passage) for number, passage in enumerate(observation.passages, start=1)]
        texts = ([plain(observation.text)] if observation.text else []) + passages
        return self._separator.join(texts) or "Nothing was found."


def parse_call(body: str, *, names: Sequence[str]) -> ToolCall | BadCall:
    """Parses the text between a pair of tool-call tags. `names`: the functions that can be called."""
    try:
        call = json.loads(body)
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()  # raises for values that no peer could receive
    except UnicodeEncodeError:  # an escape such as \ud800
        return BadCall("the tool call has half of a surrogate pair", breaks_format=True)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer with too many digits, NaN, 1e999
        return BadCall(f"the tool call is not valid JSON: {error}", breaks_format=True)
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        return BadCall("a tool call is a JSON object with `name` and `arguments`", breaks_format=True)
    if not isinstance(call["name"], str) or call["name"] not in names:
        known = f"the only one is {names[0]}" if len(names) == 1 else f"there are {', '.join(names)}"
        return BadCall(f"there is no tool {call['name']!r:.80}; {known}")
    if not isinstance(call["arguments"], dict):
        return BadCall("`arguments` must be a JSON object")
    return ToolCall(call["name"], call["arguments"])


def plain(text: str) -> str:
    """Breaks chat tokens and tags in text from outside (a question, passage or memory): their `<` becomes `< `."""
    return _CONTROL.sub("< ", text)


def _turn(role: str, text: str) -> str:
    return f"{_START}{role}\n{text}{_END}"


def _passage(number: int, passage: Passage) -> str:
    title = f"{plain(passage.title)}: " if passage.title else ""
    return f"[{number}] {title}{plain(passage.text)}"
