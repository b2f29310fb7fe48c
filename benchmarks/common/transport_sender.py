"""The sending process of benchmarks/transport.py: one function per method."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import msgpack
import numpy as np
import zmq

from actor.runner import Runner
from benchmarks.common.synthetic import NUM_TRAJECTORIES, make_group
from protocol.codec import encode_group
from protocol.framing import Buffer
from protocol.messages import Lease
from protocol.transport import Transport
from protocol.types import TrajectoryGroup

# The maximum of unacknowledged groups. Receivers acknowledge every ACK_EVERY-th group; those
# that store groups acknowledge each one.
IN_FLIGHT = 32
ACK_EVERY = 16


def send_all(connection: Connection) -> None:
    """For each (method, address, number) received: sends the groups, then sends back its processor seconds."""
    group = make_group()
    while (order := connection.recv()) is not None:
        method, address, num = order
        if method in SENDERS:
            SENDERS[method](group, address, num)
        connection.send(time.process_time())


def _send_sync(address: str, num: int, make: Callable[[], list[Buffer]], *, acks_every: int) -> None:
    """Sends from a synchronous DEALER, with at most IN_FLIGHT unacknowledged groups."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        num_open = 0
        for _ in range(num):
            socket.send_multipart(make(), copy=False)
            num_open += 1
            if num_open == IN_FLIGHT:
                socket.recv()
                num_open -= acks_every
        while num_open >= acks_every:
            socket.recv()
            num_open -= acks_every


def _columns(group: TrajectoryGroup) -> list[Buffer]:
    """Returns token_ids, loss_mask and behavior_logprobs of every token, and the spans."""
    contexts = list(group.contexts())
    spans = [span for context in contexts for span in context.policy_versions]
    columns = [
        np.concatenate([context.token_ids for context in contexts]),
        np.concatenate([context.loss_mask for context in contexts]),
        np.concatenate([context.behavior_logprobs for context in contexts]),
        np.array(spans, dtype=np.int32),
    ]
    return [column.tobytes() for column in columns]


def _send_raw(group: TrajectoryGroup, address: str, num: int) -> None:
    frames = _columns(group)
    _send_sync(address, num, lambda: frames, acks_every=ACK_EVERY)


def _send_raw_ours(group: TrajectoryGroup, address: str, num: int) -> None:
    frames = encode_group(group, lease_id=0)[1:]
    _send_sync(address, num, lambda: frames, acks_every=ACK_EVERY)


def _send_raw_file(group: TrajectoryGroup, address: str, num: int) -> None:
    frames = _columns(group)
    _send_sync(address, num, lambda: frames, acks_every=1)


def _send_lists(group: TrajectoryGroup, address: str, num: int) -> None:
    _send_sync(address, num, lambda: [_pack_lists(group)], acks_every=ACK_EVERY)


def _send_ours(group: TrajectoryGroup, address: str, num: int) -> None:
    async def send() -> None:
        transport = Transport()
        dealer = transport.dealer(address)
        num_open = 0
        for i in range(num):
            await dealer.send(encode_group(group, lease_id=i))
            num_open += 1
            if num_open == IN_FLIGHT:
                await dealer.recv()
                num_open -= ACK_EVERY
        while num_open >= ACK_EVERY:
            await dealer.recv()
            num_open -= ACK_EVERY
        transport.close()

    asyncio.run(send())


def _send_durable(group: TrajectoryGroup, address: str, num: int) -> None:
    """Runs a real runner with instant rollouts until the coordinator drains it."""

    async def rollout(lease: Lease, _: Callable[[], None]) -> TrajectoryGroup:
        return replace(group, run_id=lease.run_id, cursor=lease.cursor, attempt=lease.attempt)

    async def send() -> None:
        transport = Transport()
        runner = Runner(
            name="actor",
            capacity=IN_FLIGHT * NUM_TRAJECTORIES,
            dealer=transport.dealer(address),
            rollout=rollout,
            on_engines=lambda _: None,
            counters=dict,
            heartbeat_s=0.5,
            min_heartbeat_s=0.0,
        )
        await runner.run()
        transport.close()

    asyncio.run(send())


def _pack_lists(group: TrajectoryGroup) -> bytes:
    rows = [
        {
            "token_ids": each.token_ids.tolist(),
            "loss_mask": each.loss_mask.tolist(),
            "logprobs": each.behavior_logprobs.tolist(),
            "spans": [(span.start, span.end, span.version) for span in each.policy_versions],
        }
        for each in group.contexts()
    ]
    packed = msgpack.packb(rows)
    assert packed is not None
    return packed


SENDERS: dict[str, Callable[[TrajectoryGroup, str, int], None]] = {
    "raw": _send_raw,
    "raw_ours": _send_raw_ours,
    "raw_file": _send_raw_file,
    "ours": _send_ours,
    "durable": _send_durable,
    "lists": _send_lists,
}
