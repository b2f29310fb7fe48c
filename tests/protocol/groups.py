"""Hypothesis strategies for groups and for every kind of message."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from protocol import search_messages, weight_messages
from protocol.framing import Message
from protocol.messages import SubmitGroup
from protocol.types import Context, Edge, Question, Status, Trajectory, TrajectoryGroup, VersionSpan

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_LOGPROB = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False, width=32)
_STEP = st.integers(0, 2**31 - 1)
_SCALARS = st.dictionaries(_NAME, st.floats(allow_nan=False), max_size=3)

# Kinds are registered when their module is imported.
assert search_messages
assert weight_messages

KINDS: dict[str, type[Message]] = {kind: cls for kind, cls in Message.kinds.items() if cls is not SubmitGroup}


@st.composite
def contexts(draw: st.DrawFn) -> Context:
    """Up to 24 tokens in up to 6 pieces; each piece was read, or sampled with its own span."""
    pieces = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=6))
    length = sum(size for _, size in pieces)
    mask = np.zeros(length, dtype=np.bool_)
    spans: list[VersionSpan] = []
    start = 0
    for sampled, size in pieces:
        if sampled:
            mask[start : start + size] = True
            spans.append(VersionSpan(start, start + size, draw(_STEP), draw(_STEP)))
        start += size
    logprobs = np.array(draw(st.lists(_LOGPROB, min_size=length, max_size=length)), dtype=np.float32)
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
    return Context(
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, logprobs, np.float32(0)).astype(np.float32),
        policy_versions=tuple(spans),
        role=draw(_NAME),
        policy=draw(_NAME),
        turn=draw(_STEP),
        edge=draw(st.sampled_from(Edge)),
        reward=draw(st.floats(-1e6, 1e6)),
    )


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    return Trajectory(
        contexts=tuple(draw(st.lists(contexts(), max_size=3))),
        reward=draw(_FINITE),
        status=draw(st.sampled_from(Status)),
        reward_parts=draw(_SCALARS),
        stats=draw(_SCALARS),
        answer=draw(_TEXT),
    )


@st.composite
def groups(draw: st.DrawFn) -> TrajectoryGroup:
    question = Question(
        id=draw(_NAME),
        text=draw(_TEXT),
        answers=tuple(draw(st.lists(_TEXT, max_size=3))),
        metadata=draw(st.dictionaries(_NAME, _TEXT, max_size=2)),
    )
    return TrajectoryGroup(
        run_id=draw(_NAME),
        cursor=draw(st.integers(0, 2**62 - 1)),
        attempt=draw(_STEP),
        question=question,
        trajectories=tuple(draw(st.lists(trajectories(), min_size=1, max_size=4))),
    )


def messages() -> st.SearchStrategy[Message]:
    """Messages of every kind but groups, generated from their JSON schema."""
    return st.sampled_from(list(KINDS.values())).flatmap(_of)


def _of(cls: type[Message]) -> st.SearchStrategy[Message]:
    return _tree(cls.model_json_schema(), cls.model_json_schema().get("$defs", {})).map(cls.model_validate)


_CANARY = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3), st.floats(-50.0, 0.0)), max_size=3
).map(lambda rows: {"prompts": [ids for ids, _ in rows], "logprobs": [logprob for _, logprob in rows]})
"""Equal numbers of prompts and log-probs: the schema cannot express this."""


def _tree(schema: dict, definitions: dict) -> st.SearchStrategy:
    """Returns values of `schema`; supports the part of JSON schema that the messages use."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return _CANARY if name == "CanaryFields" else _tree(definitions[name], definitions)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([_tree(part, definitions) for part in schema["anyOf"]])
    match schema["type"]:
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "object" if "properties" in schema:
            return st.fixed_dictionaries(
                {name: _tree(part, definitions) for name, part in schema["properties"].items()}
            )
        case "object":
            return st.dictionaries(_NAME, _tree(schema["additionalProperties"], definitions), max_size=3)
        case "array":
            items = _tree(schema["items"], definitions)
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=schema.get("minItems", 0) + 3)
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True).map(str.strip)
        case "string":
            return _NAME if schema.get("minLength") else _TEXT
        case "integer":
            upper = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else schema.get("maximum", 2**40)
            return st.integers(schema.get("minimum", 0), upper)
        case "number":
            return _FINITE
    raise AssertionError(schema)
