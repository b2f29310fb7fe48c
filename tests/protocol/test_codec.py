"""The codec is exact for every group; any other input raises a typed error and nothing else."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import framing
from protocol.codec import decode_frames, decode_group, encode_group
from protocol.errors import IncompatibleVersion, MalformedMessage, MessageTooLarge, ProtocolError
from protocol.framing import Buffer, Message, decode, encode, expect
from protocol.messages import Heartbeat, SubmitGroup
from protocol.types import Context, Question, Trajectory, TrajectoryGroup, VersionSpan
from tests.protocol.groups import KINDS, groups
from tests.protocol.groups import messages as any_message

few = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
many = settings(few, max_examples=150)


def one_group(**changes: object) -> TrajectoryGroup:
    context = Context(
        token_ids=np.arange(6, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1, 0, 1], dtype=np.bool_),
        behavior_logprobs=np.array([0, 0, -1, -2, 0, -0.5], dtype=np.float32),
        policy_versions=(VersionSpan(2, 4, 3, 7), VersionSpan(5, 6, 4, 8)),
    )
    group = TrajectoryGroup("run", 5, 0, Question("q", "who?", ("a",)), (Trajectory((context, context), 1.0),) * 2)
    return dataclasses.replace(group, **changes)


def header_of(frames: Sequence[Buffer]) -> dict:
    return msgpack.unpackb(frames[0])


def pack(value: object) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def receive(frames: Sequence[Buffer]) -> TrajectoryGroup:
    return decode_frames(frames).unpack()


def receive_or_refuse(frames: Sequence[Buffer]) -> None:
    """Decodes `frames`; any error other than a ProtocolError fails the test."""
    try:
        message, payload = decode(frames)
        if isinstance(message, SubmitGroup):
            decode_group(message, payload)
    except ProtocolError:
        pass


def assert_same_bits(a: TrajectoryGroup, b: TrajectoryGroup) -> None:
    bare = {"trajectories": ()}
    assert dataclasses.replace(a, **bare) == dataclasses.replace(b, **bare)
    assert len(a.trajectories) == len(b.trajectories)
    for mine, other in zip(a.trajectories, b.trajectories, strict=True):
        assert dataclasses.replace(mine, contexts=()) == dataclasses.replace(other, contexts=())
        assert np.float64(mine.reward).tobytes() == np.float64(other.reward).tobytes()
        for left, right in zip(mine.contexts, other.contexts, strict=True):
            assert left.policy_versions == right.policy_versions
            for name in ("role", "policy", "turn", "edge", "reward"):
                assert getattr(left, name) == getattr(right, name)
            for name in ("token_ids", "loss_mask", "behavior_logprobs"):
                array, copy = getattr(left, name), getattr(right, name)
                assert array.dtype == copy.dtype
                assert array.tobytes() == copy.tobytes()


@few
@given(groups(), st.integers(0, 2**62 - 1))
def test_a_decoded_group_is_equal_bit_for_bit(group: TrajectoryGroup, lease_id: int) -> None:
    frames = encode_group(group, lease_id=lease_id)
    assert len(frames) == 4
    assert_same_bits(receive([bytes(frame) for frame in frames]), group)
    assert_same_bits(receive([memoryview(frame) for frame in frames]), group)
    message, _ = decode(frames)
    assert isinstance(message, SubmitGroup)
    assert message.lease_id == lease_id


@few
@given(groups())
def test_a_group_view_has_the_values_of_its_group(group: TrajectoryGroup) -> None:
    packed = decode_frames(encode_group(group, lease_id=1))
    assert (packed.run_id, packed.cursor, packed.attempt) == (group.run_id, group.cursor, group.attempt)
    assert packed.oldest_version == group.oldest_version
    each = [trajectory.num_trained_tokens for trajectory in group.trajectories]
    assert packed.num_trained_tokens_each().tolist() == each
    assert packed.num_trained_tokens == sum(each)


def test_decoded_arrays_are_read_only_views_of_the_frames() -> None:
    frames = encode_group(one_group(), lease_id=1)
    context = receive(frames).trajectories[0].contexts[0]
    assert np.shares_memory(context.token_ids, np.frombuffer(frames[1], np.int32))
    for name in ("token_ids", "loss_mask", "behavior_logprobs"):
        assert not getattr(context, name).flags.owndata
        assert not getattr(context, name).flags.writeable


@many
@given(any_message())
def test_a_decoded_message_is_equal(message: Message) -> None:
    again, payload = decode([encode(message), b"payload"])
    assert again == message
    assert type(again) is type(message)
    assert list(payload) == [b"payload"]


def test_the_strategies_cover_every_kind_of_message() -> None:
    assert set(KINDS) | {"group"} == set(Message.kinds)
    assert "" not in KINDS


# --- refusals --------------------------------------------------------------------------------------------------


@many
@given(st.lists(st.binary(max_size=64), max_size=10))
def test_random_bytes_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


_json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.binary(max_size=3), inner),
    max_leaves=8,
)


@many
@given(_json_like)
def test_random_msgpack_values_are_refused(value: object) -> None:
    try:
        frame = pack(value)
    except UnicodeEncodeError:
        return
    with pytest.raises(ProtocolError):
        decode([frame])


@many
@given(any_message(), st.data())
def test_a_truncated_header_is_refused(message: Message, data: st.DataObject) -> None:
    frame = encode(message)
    with pytest.raises(ProtocolError):
        decode([frame[: data.draw(st.integers(0, len(frame) - 1))]])


@many
@given(any_message(), st.data())
def test_a_changed_field_is_accepted_or_refused(message: Message, data: st.DataObject) -> None:
    header = msgpack.unpackb(encode(message))
    key = data.draw(st.sampled_from(sorted(header)))
    header[key] = data.draw(_json_like)
    try:
        frame = pack(header)
    except UnicodeEncodeError:
        return
    receive_or_refuse([frame])


@few
@given(any_message(), st.text(min_size=1, max_size=8), st.data())
def test_missing_and_extra_keys_are_refused(message: Message, extra: str, data: st.DataObject) -> None:
    header = msgpack.unpackb(encode(message))
    if extra not in header:
        with pytest.raises(MalformedMessage, match="Extra inputs"):
            decode([pack({**header, extra: 1})])
    required = [name for name, field in type(message).model_fields.items() if field.is_required()]
    if required:
        del header[data.draw(st.sampled_from(required))]
        with pytest.raises(MalformedMessage):
            decode([pack(header)])


@many
@given(any_message(), st.data())
def test_a_flipped_bit_is_accepted_or_refused(message: Message, data: st.DataObject) -> None:
    receive_or_refuse([_flip(encode(message), data)])


@settings(few, max_examples=80)
@given(groups(), st.data())
def test_damaged_groups_are_accepted_or_refused(group: TrajectoryGroup, data: st.DataObject) -> None:
    frames = [bytes(frame) for frame in encode_group(group, lease_id=1)]
    index = data.draw(st.integers(0, 3))
    damage = data.draw(st.sampled_from(["flip", "cut", "drop", "double", "swap", "empty"]))
    match damage:
        case "flip" if frames[index]:
            frames[index] = _flip(frames[index], data)
        case "cut" if frames[index]:
            frames[index] = frames[index][: data.draw(st.integers(0, len(frames[index]) - 1))]
            with pytest.raises(ProtocolError):
                receive(frames)
        case "drop":
            del frames[index]
            with pytest.raises(ProtocolError):
                receive(frames)
        case "double":
            frames.insert(index, frames[index])
            with pytest.raises(ProtocolError):
                receive(frames)
        case "swap":
            frames[index], frames[index - 1] = frames[index - 1], frames[index]
        case _:
            frames[index] = b""
    receive_or_refuse(frames)


@settings(few, max_examples=80)
@given(groups(), st.data())
def test_group_headers_with_changed_columns_are_accepted_or_refused(
    group: TrajectoryGroup, data: st.DataObject
) -> None:
    """Columns of different lengths, indices out of range, and huge lengths are refused before memory is allocated."""
    frames = encode_group(group, lease_id=1)
    header = header_of(frames)
    columns = sorted(key for key, value in header.items() if isinstance(value, list))
    column = data.draw(st.sampled_from(columns))
    what = data.draw(st.sampled_from(["huge", "longer", "shorter"]))
    values = header[column]
    if what == "huge" and values and isinstance(values[0], int):
        values[data.draw(st.integers(0, len(values) - 1))] = data.draw(st.integers(-1, 2**62))
    elif what == "longer":
        values.append(values[-1] if values else 0)
    elif values:
        values.pop()
    receive_or_refuse([pack(header), *frames[1:]])


def _flip(frame: bytes, data: st.DataObject) -> bytes:
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    flipped = bytearray(frame)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_lengths": [2**31 - 1] * 4}, "token_ids must have .* bytes"),
        ({"context_num_spans": [2**31 - 1] * 4}, "spans must have .* bytes"),
        ({"context_lengths": [2**31] * 4}, "context_lengths"),
        ({"context_lengths": [-6, 6, 6, 6]}, "context_lengths"),
        ({"context_roles": [0, 0, 0, 1]}, "context_roles must be below 1, got 1"),
        ({"num_contexts": [1, 2]}, "num_contexts must add up to 4, got 3"),
        ({"rewards": []}, "it must have at least 1 trajectory, got 0"),
        ({"rewards": [1.0, float("nan")]}, "rewards must be finite"),
        ({"rewards": [1.0, "1"]}, "rewards.1"),
        ({"statuses": ["completed", "excellent"]}, "statuses.1"),
        ({"reward_parts": {"em": [1.0]}}, "reward_parts.em must have 2 entries, got 1"),
        ({"question": {"id": "", "text": "", "answers": []}}, "question.id"),
        ({"lease_id": True}, "lease_id"),
        ({"lease_id": 2**62}, "lease_id"),
    ],
)
def test_inconsistent_group_headers_are_refused_with_the_field(changes: dict, message: str) -> None:
    frames = encode_group(one_group(), lease_id=1)
    with pytest.raises(MalformedMessage, match=message):
        receive([pack({**header_of(frames), **changes}), *frames[1:]])


@pytest.mark.parametrize(
    ("frame", "change", "message"),
    [
        (1, (0, -1), "token_ids must be >= 0, got -1"),
        (2, (0, -1), "0 <= start < end"),
        (2, (1, 2), "0 <= start < end"),
        (2, (1, 7), "0 <= start < end <= its context's length"),
        (2, (1, 5), "must have the 13 entries that spans cover, got 12"),
        (2, (1, 6), "spans must be ascending"),
        (2, (2, -3), "0 <= start < end"),
        (3, (2, np.nan), "behavior_logprobs must be finite"),
        (3, (2, -np.inf), "behavior_logprobs must be finite"),
        (3, (2, 0.1), "behavior_logprobs must be finite and <= 0"),
    ],
)
def test_inconsistent_group_columns_are_refused_with_the_field(
    frame: int, change: tuple[int, float], message: str
) -> None:
    dtype = {1: "<i4", 2: "<i4", 3: "<f4"}[frame]
    frames = encode_group(one_group(), lease_id=1)
    column = np.frombuffer(frames[frame], dtype=dtype).copy()
    column[change[0]] = change[1]
    frames[frame] = column.tobytes()
    with pytest.raises(MalformedMessage, match=message):
        receive(frames)


@pytest.mark.parametrize(("start", "end"), [(2, 3), (1, 4), (2, 5)])
def test_encoding_refuses_spans_that_differ_from_the_loss_mask(start: int, end: int) -> None:
    context = one_group().trajectories[0].contexts[0]
    other = dataclasses.replace(context, policy_versions=(VersionSpan(start, end, 3, 7), context.policy_versions[1]))
    with pytest.raises(MalformedMessage, match="spans must cover every sampled token once"):
        encode_group(one_group(trajectories=(Trajectory((other,), 0.0),)), lease_id=1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(6, dtype=np.int64), "token_ids must be of int32, got int64"),
        (np.arange(12, dtype=np.int32)[::2], "token_ids must be contiguous"),
    ],
)
def test_encoding_refuses_arrays_of_another_type_or_layout(array: np.ndarray, message: str) -> None:
    context = dataclasses.replace(one_group().trajectories[0].contexts[0], token_ids=array)
    with pytest.raises(MalformedMessage, match=message):
        encode_group(one_group(trajectories=(Trajectory((context,), 0.0),)), lease_id=1)


def test_encoding_refuses_a_header_that_is_too_large() -> None:
    trajectory = dataclasses.replace(one_group().trajectories[0], answer="x" * (framing.MAX_HEADER_BYTES + 1))
    with pytest.raises(MessageTooLarge, match="header has at most"):
        encode_group(one_group(trajectories=(trajectory,)), lease_id=1)


@pytest.mark.parametrize("stats", [{"turns": np.float32(1)}, {"turns": 2**64}, {"\ud800": 1.0}])
def test_encoding_refuses_values_that_msgpack_cannot_represent(stats: dict[str, float]) -> None:
    trajectory = dataclasses.replace(one_group().trajectories[0], stats=stats)
    with pytest.raises(MalformedMessage):
        encode_group(one_group(trajectories=(trajectory,)), lease_id=1)


@pytest.mark.parametrize("name", ["loss_mask", "behavior_logprobs"])
def test_encoding_refuses_columns_of_another_length(name: str) -> None:
    context = one_group().trajectories[0].contexts[0]
    longer = dataclasses.replace(context, **{name: np.append(getattr(context, name), getattr(context, name)[:1])})
    with pytest.raises(MalformedMessage, match="a context of 6 tokens must have"):
        encode_group(one_group(trajectories=(Trajectory((longer,), 0.0),)), lease_id=1)


def test_encoding_refuses_a_field_out_of_its_bounds() -> None:
    with pytest.raises(MalformedMessage, match=r"group: attempt: .* \(got -1\)"):
        encode_group(one_group(attempt=-1), lease_id=1)


def test_spans_that_are_not_ascending_are_refused() -> None:
    frames = encode_group(one_group(), lease_id=1)
    spans = np.frombuffer(frames[2], np.int32).reshape(-1, 4)
    frames[2] = spans[[1, 0, *range(2, len(spans))]].tobytes()
    with pytest.raises(MalformedMessage, match="ascending"):
        receive(frames)


def test_too_large_headers_and_frames_and_too_many_frames_are_refused() -> None:
    with pytest.raises(MessageTooLarge, match=r"header has at most .* bytes"):
        decode([b"\x80" * (framing.MAX_HEADER_BYTES + 1)])
    large = bytes(framing.MAX_MESSAGE_BYTES // 2)
    with pytest.raises(MessageTooLarge, match=r"a message has at most .* bytes"):
        decode([encode(KINDS["drain"]()), large, large])
    for frames in ([], [b""] * (framing.MAX_FRAMES + 1)):
        with pytest.raises(MalformedMessage, match="1 to 8 frames"):
            decode(frames)


@pytest.mark.parametrize("version", [None, 0, 1, "2", True, [2]])
def test_another_protocol_version_is_refused(version: object) -> None:
    with pytest.raises(IncompatibleVersion, match="protocol version must be 3"):
        decode([pack({"v": version, "kind": "drain"})])


@pytest.mark.parametrize("kind", [None, "", "message", "Drain", 7, ["drain"], {"kind": "drain"}])
def test_unknown_kinds_are_refused(kind: object) -> None:
    with pytest.raises(MalformedMessage, match="unknown message kind"):
        decode([pack({"v": 3, "kind": kind})])


def test_expect_refuses_another_kind() -> None:
    with pytest.raises(MalformedMessage, match="expected heartbeat, got drain"):
        expect(KINDS["drain"](), Heartbeat)


def nested(depth: int) -> bytes:
    """`depth` nested lists as msgpack."""
    return b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize("depth", [500, 1_000, 1_022, 5_000, 1_000_000])
@pytest.mark.parametrize(
    "header",
    [
        b"\x82\xa1v%s\xa4kind\xa5drain",
        b"\x82\xa1v\x02\xa4kind%s",
        b"\x83\xa1v\x02\xa4kind\xa5drain\xa6reason%s",
        b"%s",
    ],
)
def test_deep_nesting_is_refused(header: bytes, depth: int) -> None:
    with pytest.raises(ProtocolError):
        decode([header % nested(depth)])


@pytest.mark.parametrize("extra", [b"\xd4\x05\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x0c\xff" + b"\xff" * 12])
def test_extension_types_are_refused(extra: bytes) -> None:
    for header in (b"\x81\xa1v" + extra, b"\x83\xa1v\x02\xa4kind\xa5drain\xa6reason" + extra):
        with pytest.raises(ProtocolError):
            decode([header])


@pytest.mark.parametrize(
    "declared", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_huge_declared_lengths_are_refused(declared: bytes) -> None:
    with pytest.raises(MalformedMessage, match="not msgpack"):
        decode([b"\x81\xa1v" + declared])


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rewards", [None] * 500_000),
        ("answers", [0] * 500_000),
        ("reward_parts", {str(number): 0 for number in range(300_000)}),
        ("reward_parts", {"em": ["x"] * 500_000}),
        ("question", {str(number): 0 for number in range(300_000)}),
    ],
)
def test_a_header_with_a_million_errors_is_refused_quickly(key: str, values: object) -> None:
    """A 4 MB header in which every value is wrong must not delay the coordinator."""
    header = {**header_of(encode_group(one_group(), lease_id=1)), key: values}
    frame = pack(header)
    started = time.process_time()
    with pytest.raises(MalformedMessage) as refused:
        decode([frame])
    assert time.process_time() - started < 1.5
    assert len(str(refused.value)) < 500
