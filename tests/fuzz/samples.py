"""A valid group, and a valid message of every kind."""

from __future__ import annotations

import numpy as np

from protocol.framing import Message, encode
from protocol.types import Context, Question, Status, Trajectory, TrajectoryGroup, VersionSpan
from tests.fuzz.mutate import Frames


def sample_group() -> TrajectoryGroup:
    context = Context(
        token_ids=np.arange(12, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0], dtype=np.bool_),
        behavior_logprobs=np.array([0, 0, -1, -2, -0.5, 0, 0, -3, -4, 0, 0, 0], dtype=np.float32),
        policy_versions=(VersionSpan(2, 4, 3, 4), VersionSpan(4, 5, 4, 5), VersionSpan(7, 9, 4, 5)),
        role="memory",
    )
    one = Trajectory((context, context), 1.0, reward_parts={"em": 1.0}, stats={"turns": 2.0}, answer="w1")
    two = Trajectory((context,), 0.0, status=Status.FORMAT_ERROR, reward_parts={"em": 0.0})
    return TrajectoryGroup("run", 7, 1, Question("q7", "who?", ("w1", "w2"), {"hops": "2"}), (one, two))


def _sample(schema: dict, definitions: dict) -> object:
    """Returns a value of `schema`; supports the part of JSON schema that the messages use."""
    if "$ref" in schema:
        return _sample(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in schema:
        return _sample(schema["anyOf"][0], definitions)
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object" if "properties" in schema:
            return {name: _sample(part, definitions) for name, part in schema["properties"].items()}
        case "object":
            return {"key": _sample(schema["additionalProperties"], definitions)}
        case "array":
            return [_sample(schema["items"], definitions)] * 2
        case "string":
            return "0" * 32 if schema.get("pattern", "").endswith("{32}$") else "a name"
        case "boolean":
            return True
        case "integer":
            return max(3, schema.get("minimum", 0))
        case _:
            return 0.5


def sample_messages() -> list[Frames]:
    """Returns one message of each kind in `Message.kinds`."""
    samples = []
    for cls in Message.kinds.values():
        schema = cls.model_json_schema()
        message = cls.model_validate(_sample(schema, schema.get("$defs", {})))
        samples.append([encode(message), b"payload"])
    return samples
