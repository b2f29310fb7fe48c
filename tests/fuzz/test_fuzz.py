"""Every decoder of input from another process, on mutated valid messages: it raises only its typed errors, and
memory does not grow."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from actor.engine.request_bodies import AbortBody, ContinueBody, GenerateBody, PauseBody, UpdateBody, parse_body
from actor.engines.completion import parse_completion
from actor.weights.fetch import check_manifest, check_tensors
from protocol import deltas
from protocol.codec import decode_group, encode_group, pack_groups, unpack_groups
from protocol.errors import EngineError, EngineRefused, ProtocolError, UnknownVersion, WeightsError
from protocol.framing import decode, encode
from protocol.messages import SubmitGroup
from protocol.resident_memory import resident_mb
from protocol.types import PolicyTag
from protocol.weight_messages import Manifest
from retriever.service import request_id_of
from tests.fuzz.mutate import Frames, mutated
from tests.fuzz.samples import sample_group, sample_messages

MAX_GROWTH_BYTES = 16 << 20


@dataclass(frozen=True)
class Decoder:
    """A decoder under test. `read` may raise `errors` only. `tree`: see `mutated`."""

    samples: Sequence[Frames]
    read: Callable[[Frames], object]
    errors: tuple[type[Exception], ...]
    tree: str = ""


def _read_group(frames: Frames) -> None:
    message, payload = decode(frames)
    if isinstance(message, SubmitGroup):
        group = decode_group(message, payload).unpack()
        assert sum(context.num_trained_tokens for context in group.contexts()) <= sum(map(len, frames))


_TAG = PolicyTag("run", 4, 3)
_HELD = np.arange(4_000, dtype=np.uint16).tobytes()
_NEW = (np.arange(4_000, dtype=np.uint16) + (np.arange(4_000) % 37 == 0)).astype(np.uint16).tobytes()


def _manifest() -> Manifest:
    part = {"base": 2, "publication": 4, "num_bytes": 10, "checksum": "0" * 32, "chunk_checksums": ["0" * 32] * 2}
    tensor = {"name": "w", "shape": [1], "dtype": "F32", "offset": 62, "num_bytes": 4}
    return Manifest.model_validate(
        {
            "request_id": 1, "run_id": "run", "publication": 4, "version": 3, "num_bytes": 66, "word_bytes": 4,
            "chunk_bytes": 8, "tensors": [tensor], "parts": [part],
        }
    )  # fmt: skip


def _read_manifest(frames: Frames) -> None:
    message, _ = decode(frames)
    if isinstance(message, Manifest):
        check_manifest(message, _TAG, held=2)


def _deltas() -> list[Frames]:
    return [[deltas.encode(_NEW, base, word_bytes=2)] for base in (_HELD, bytes(len(_HELD)), None)]


def _read_delta(frames: Frames) -> None:
    made = deltas.decode(b"".join(frames), _HELD, num_bytes=len(_NEW), word_bytes=2, expected=deltas.checksum(_NEW))
    assert bytes(made) == _NEW


def _safetensors() -> list[Frames]:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    deep = b'{"w":' + b"[" * 100_000
    return [[len(text).to_bytes(8, "little") + text + bytes(4)] for text in (header, deep)]


def _answers() -> list[Frames]:
    meta = {
        "finish_reason": {"type": "stop", "matched": 9}, "prompt_tokens": 5, "completion_tokens": 3,
        "cached_tokens": 2, "weight_version": "run:4:3",
        "weight_versions": [{"version": "run:3:2", "start": 0, "end": 1}, {"version": "run:4:3", "start": 1, "end": 3}],
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None], [-0.1, 9, None]],
    }  # fmt: skip
    spanless = {name: value for name, value in meta.items() if name != "weight_versions"}
    return [[json.dumps({"output_ids": [7, 8, 9], "meta_info": fields}).encode()] for fields in (meta, spanless)]


def _bodies() -> list[Frames]:
    generate = {
        "input_ids": [[1, 2, 3], [4, 5]], "sampling_params": {"temperature": 0.5, "stop": ["a"], "max_new_tokens": 4},
        "rid": ["a", "b"], "return_logprob": True,
    }  # fmt: skip
    bodies: list[object] = [generate, {**generate, "input_ids": [1, 2], "rid": "a"}, {"mode": "retract"}]
    bodies += [{"model_path": "/x", "weight_version": "run:4:3", "flush_cache": True}, {"rid": "a", "abort_all": False}]
    return [[json.dumps(body).encode()] for body in bodies]


_MODELS = (GenerateBody, PauseBody, ContinueBody, UpdateBody, AbortBody)


def _read_body(frames: Frames) -> None:
    """Parses the body for every route. Raises: EngineRefused (every route refuses it)."""
    num_refused = 0
    for model in _MODELS:
        try:
            parse_body(model, b"".join(frames))
        except EngineRefused:
            num_refused += 1
    if num_refused == len(_MODELS):
        raise EngineRefused("every route refuses it")


def _decoders() -> dict[str, Decoder]:
    group = [bytes(frame) for frame in encode_group(sample_group(), lease_id=3)]
    return {
        "message": Decoder(sample_messages(), decode, (ProtocolError,), "msgpack"),
        "group": Decoder([group], _read_group, (ProtocolError,), "msgpack"),
        "groups": Decoder(
            [[pack_groups([sample_group()] * 2)]], lambda f: unpack_groups(b"".join(f)), (ProtocolError,)
        ),
        "manifest": Decoder([[encode(_manifest())]], _read_manifest, (ProtocolError, WeightsError), "msgpack"),
        "delta": Decoder(_deltas(), _read_delta, (WeightsError,)),
        "tensors": Decoder(
            _safetensors(), lambda frames: check_tensors(b"".join(frames), _manifest()), (WeightsError,)
        ),
        "search": Decoder(sample_messages(), request_id_of, (), "msgpack"),
        "answer": Decoder(
            _answers(),
            lambda frames: parse_completion(b"".join(frames), seen_version="run:4:3", engine="e"),
            (EngineError,),
            "json",
        ),
        "body": Decoder(_bodies(), _read_body, (EngineRefused,), "json"),
        "tag": Decoder(
            [[b"run:4:3"], [b"default"], [b"run:" + b"9" * 5_000 + b":1"]],
            lambda frames: PolicyTag.parse(b"".join(frames).decode("utf-8", "replace")),
            (UnknownVersion,),
        ),
    }


DECODERS = _decoders()


def _fuzz(decoder: Decoder, *, num: int, seed: int) -> tuple[int, int]:
    """Returns the number of refused messages, and the growth of resident memory over the last 4/5 of them, in bytes."""
    rng = random.Random(seed)
    num_refused, before = 0, 0.0
    for i in range(num):
        if i == num // 5:
            gc.collect()
            before = resident_mb()
        frames = mutated(rng, decoder.samples, tree=decoder.tree)
        try:
            decoder.read(frames)
        except decoder.errors:
            num_refused += 1
        except Exception as error:
            raise AssertionError(f"message {i} of seed {seed}: {[frame[:200] for frame in frames]}") from error
    gc.collect()
    return num_refused, round(1e6 * (resident_mb() - before))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_accept_the_unchanged_samples(name: str) -> None:
    DECODERS[name].read(DECODERS[name].samples[0])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("num", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_messages_raise_only_typed_errors(name: str, num: int) -> None:
    """With slow tests: a million messages in total over all decoders."""
    num_refused, growth_bytes = _fuzz(DECODERS[name], num=num, seed=0)
    assert num_refused > num / 10 or not DECODERS[name].errors
    assert num_refused < num
    assert growth_bytes < MAX_GROWTH_BYTES
