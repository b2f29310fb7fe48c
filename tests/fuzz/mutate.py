"""Mutates valid messages: damages bytes, or replaces values in a msgpack or JSON tree by hostile ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

Frames = list[bytes]

_LONG = "x" * 5_000
_DEEP: object = 0
for _ in range(200):
    _DEEP = [_DEEP]
_HOSTILE: tuple[object, ...] = (
    None, True, False, -1, 0, 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64 - 1, 1e300, -1e300, 5e-324, 0.5,
    "", "\0", "default", "a:1:2", _LONG, "9" * 5_000, [], {}, [None], [[]], {"v": 1}, {"": {}}, [-1] * 50, _DEEP,
)  # fmt: skip
_NOT_JSON: tuple[object, ...] = (float("nan"), float("inf"), b"", b"\xff" * 40, msgpack.ExtType(5, b"x"))


def mutated(rng: random.Random, samples: Sequence[Frames], *, tree: str) -> Frames:
    """Returns one of `samples`, mutated. `tree` is the format of its first frame: "msgpack", "json" or "" (bytes)."""
    frames = list(rng.choice(samples))
    if tree and rng.random() < 0.6:
        frames[0] = _mutate_tree(rng, frames[0], tree)
    if not tree or rng.random() < 0.5:
        for _ in range(rng.randint(1, 4)):
            rng.choice((_damage, _damage, _damage, _reorder))(rng, frames, samples)
    return frames


def _mutate_tree(rng: random.Random, frame: bytes, tree: str) -> bytes:
    """Replaces or removes up to three nodes of the tree in `frame`, or inserts nodes beside them."""
    values = _HOSTILE if tree == "json" else _HOSTILE + _NOT_JSON
    root = json.loads(frame) if tree == "json" else msgpack.unpackb(frame)
    for _ in range(rng.randint(1, 3)):
        node = root
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            child = node[key]
            if isinstance(child, dict | list) and child and rng.random() < 0.7:
                node = child
                continue
            _change_node(rng, node, key, values)
            break
    packed = json.dumps(root).encode() if tree == "json" else msgpack.packb(root)
    assert packed is not None
    return packed


def _change_node(rng: random.Random, node: dict | list, key: Any, values: Sequence[object]) -> None:
    match rng.randrange(8):
        case 0:
            del node[key]
        case 1:
            if isinstance(node, list):
                node.extend(copy.deepcopy(node[:50]))
            else:
                node[rng.choice(("extra", "kind", "v", "_", "\0"))] = copy.deepcopy(rng.choice(values))
        case _:
            node[key] = copy.deepcopy(rng.choice(values))


def _damage(rng: random.Random, frames: Frames, samples: Sequence[Frames]) -> None:
    if not frames:
        return
    i = rng.randrange(len(frames))
    data = bytearray(frames[i])
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 4, 8, 64))
    match rng.randrange(7):
        case 0 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[at % len(data)] = rng.choice((0x00, 0x7F, 0x80, 0xC1, 0xD9, 0xDD, 0xDF, 0xFF))
        case 2:
            del data[at:]
        case 3:
            del data[at : at + size]
        case 4:
            data[at:at] = rng.randbytes(size)
        case 5:
            data[at : at + size] = rng.choice((b"\0", b"\xff")) * size
        case _:
            other = rng.choice(rng.choice(samples) or [b""])
            data[at : at + size] = other[at : at + size]
    frames[i] = bytes(data)


def _reorder(rng: random.Random, frames: Frames, _: Sequence[Frames]) -> None:
    changes: tuple[Callable[[], object], ...] = (
        lambda: frames.append(rng.randbytes(rng.randrange(40))),
        lambda: frames and frames.pop(rng.randrange(len(frames))),
        lambda: frames and frames.append(rng.choice(frames)),
        lambda: rng.shuffle(frames),
    )
    rng.choice(changes)()
