"""Encodes and decodes messages: a header frame (a msgpack map of the protocol version, the kind and the fields) and
zero or more raw payload frames.

Headers are validated strictly: an unknown key, a missing key or a value of another type is a `MalformedMessage`.
Nothing is pickled. The kinds of messages are in `protocol.messages`, `protocol.weight_messages` and
`protocol.search_messages`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import IncompatibleVersion, MalformedMessage, MessageTooLarge

PROTOCOL_VERSION = 3
MAX_HEADER_BYTES = 4 << 20
# In all frames of a message. The connection guard closes a connection with 40 MiB of unread bytes.
MAX_MESSAGE_BYTES = 32 << 20
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES
MAX_FRAMES = 8
_MAX_PROBLEMS = 1_000

Buffer = bytes | memoryview

_QUOTES = reprlib.Repr()
_QUOTES.maxlevel = 3
_QUOTES.maxstring = 60


class Message(BaseModel):
    """Base of all message headers. A subclass sets `kind`, from which `decode` finds the class.

    Fields are validated strictly, and unknown keys are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Message]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        Message.kinds[cls.kind] = cls


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Returns the header frame of `message`."""
    return _pack(message.kind, message.model_dump())


def encode_fields(cls: type[Message], fields: dict[str, object]) -> bytes:
    """Returns the header frame of a message `cls` with these fields, which are not copied. Raises: MalformedMessage."""
    _validated(cls, fields)
    try:
        return _pack(cls.kind, fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedMessage(f"{cls.kind}: {error}") from error


def decode(frames: Sequence[Buffer]) -> tuple[Message, Sequence[Buffer]]:
    """Returns the message in `frames` and its payload frames (not copied).

    Raises: MessageTooLarge, IncompatibleVersion, MalformedMessage (truncated, not a message, not matching the schema).
    """
    check_sizes(frames)
    try:
        fields = msgpack.unpackb(frames[0], raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise MalformedMessage(f"header is not msgpack: {error}") from error
    if not isinstance(fields, dict):
        raise MalformedMessage(f"header must be a map, got {type(fields).__name__}")
    version = fields.pop("v", None)
    if version != PROTOCOL_VERSION or isinstance(version, bool):
        raise IncompatibleVersion(f"protocol version must be {PROTOCOL_VERSION}, got {quote(version)}")
    kind = fields.pop("kind", None)
    cls = Message.kinds.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise MalformedMessage(f"unknown message kind {quote(kind)}")
    return _validated(cls, fields), frames[1:]


def check_sizes(frames: Sequence[Buffer]) -> None:
    """Checks the number of frames and their sizes. Raises: MalformedMessage, MessageTooLarge."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise MalformedMessage(f"a message has 1 to {MAX_FRAMES} frames, got {len(frames)}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise MessageTooLarge(f"a header has at most {MAX_HEADER_BYTES} bytes, got {len(frames[0])}")
    if (num_bytes := sum(map(len, frames))) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(f"a message has at most {MAX_MESSAGE_BYTES} bytes, got {num_bytes}")


def expect(message: Message, cls: type[M]) -> M:
    """Returns `message`, typed as `cls`. Raises: MalformedMessage if it is of another kind."""
    if not isinstance(message, cls):
        raise MalformedMessage(f"expected {cls.kind}, got {message.kind}")
    return message


def _pack(kind: str, fields: dict[str, object]) -> bytes:
    packed = msgpack.packb({"v": PROTOCOL_VERSION, "kind": kind, **fields}, use_bin_type=True)
    assert packed is not None
    return packed


def _validated(cls: type[M], fields: dict[str, object]) -> M:
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise MalformedMessage(f"{cls.kind}: {describe(error)}") from error


def quote(value: object) -> str:
    """Returns a repr of at most 80 characters of a value that a peer sent, however long or deeply nested it is."""
    return f"{_QUOTES.repr(value):.80}"


def describe(error: ValidationError, limit: int = 3) -> str:
    """Returns the first `limit` problems of a pydantic error in one line: `path: problem (got value)`."""
    if error.error_count() > _MAX_PROBLEMS:  # formatting a million problems takes seconds
        return f"{error.error_count()} problems"
    parts = []
    for problem in error.errors()[:limit]:
        path = ".".join(str(part) for part in problem["loc"])
        parts.append(f"{path}: {problem['msg']} (got {quote(problem['input'])})")
    rest = error.error_count() - limit
    return "; ".join(parts) + (f"; and {rest} more" if rest > 0 else "")
