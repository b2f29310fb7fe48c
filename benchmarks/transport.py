"""Groups/s from per-context arrays at an actor to a validated group at a learner, compared with other transports.

    python benchmarks/transport.py [--quick] [--rounds 15]

raw      pyzmq alone: token ids, loss mask, log-probs and spans of a group, encoded in advance, as four frames from a
         DEALER to a ROUTER, synchronous sockets, frames not read: the upper limit
raw_ours as raw, with the three frames of `ours`, which have log-probs of sampled tokens only, and no mask
ours     what `actor.runner` and the coordinator do, without leases: encode_group (checks), Dealer; Router, decode,
         decode_group (validates); trajectory objects are made on access only, and not accessed here
judged   as ours, plus the coordinator's judge, which decides whether the group is trained
viewed   as judged, and all trajectory and context objects are made
durable  as ours, through a real Runner and a real NetworkThread: leases, one durable SQLite transaction per lease and
         group, acknowledgements. `vs_raw_durable` is against raw, which stores nothing; `durable_vs_raw_file` against
         raw with a receiver that appends each group to a file, syncs it and acknowledges it; in both, as many groups
         are in flight
lists    Python lists in msgpack, converted to arrays at the receiver
ray      objects of a Ray actor, 8 in flight; null if Ray is not installed (pip install 'palimpsest-rl[ray]')

A group is 8 trajectories of 4 contexts, 38,697 tokens. One process sends, one receives; every method is measured in
every round, in rotating order; a ratio is the median of the rounds' ratios. `cpu_…` are ratios of the processor
time of both processes, which varies less on a machine with other load. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgpack
import numpy as np
import zmq

from benchmarks.common.serving import report_serving
from benchmarks.common.synthetic import NUM_TRAJECTORIES, PUBLICATION, RUN, VOCABULARY, make_group
from benchmarks.common.transport_sender import ACK_EVERY, send_all
from learner.leases.admission import Rules, judge
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import decode_group
from protocol.config import NetworkConfig
from protocol.framing import decode, expect
from protocol.messages import SubmitGroup
from protocol.transport import Transport
from protocol.types import TrajectoryGroup

RULES = Rules(run_id=RUN, group_size=NUM_TRAJECTORIES, vocab_size=VOCABULARY, skip_zero_variance=True)
# Groups per round: a round of each method takes about half a second.
NUM_GROUPS = {
    "raw": 2_000,
    "raw_ours": 2_000,
    "ours": 1_200,
    "judged": 1_200,
    "viewed": 800,
    "durable": 150,
    "raw_file": 150,
    "lists": 80,
    "ray": 160,
}


def _rate(arrivals_s: list[float]) -> float:
    return (len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0])


def _receive(
    method: str, num: int, connection: Connection, handle: Callable[[list[zmq.Frame]], None], *, ack_every: int
) -> float:
    """Returns groups/s at a synchronous ROUTER."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        connection.send((method, f"tcp://127.0.0.1:{port}", num))
        arrivals_s = []
        for i in range(num):
            frames = socket.recv_multipart(copy=False)
            handle(frames)
            arrivals_s.append(time.perf_counter())
            if (i + 1) % ack_every == 0:
                socket.send_multipart([frames[0], b""])
        connection.recv()
    return _rate(arrivals_s)


def receive_raw(num: int, connection: Connection, *, method: str = "raw") -> float:
    return _receive(method, num, connection, lambda _frames: None, ack_every=ACK_EVERY)


def receive_raw_file(num: int, connection: Connection) -> float:
    with tempfile.TemporaryFile() as file:

        def store(frames: list[zmq.Frame]) -> None:
            for frame in frames[1:]:
                file.write(frame.buffer)
            file.flush()
            os.fdatasync(file.fileno())

        return _receive("raw_file", num, connection, store, ack_every=1)


def receive_lists(num: int, connection: Connection) -> float:
    def unpack(frames: list[zmq.Frame]) -> None:
        for row in msgpack.unpackb(frames[1].buffer):
            np.asarray(row["token_ids"], dtype=np.int32)
            np.asarray(row["loss_mask"], dtype=np.bool_)
            np.asarray(row["logprobs"], dtype=np.float32)

    return _receive("lists", num, connection, unpack, ack_every=ACK_EVERY)


def receive_ours(num: int, connection: Connection, *, judged: bool = False, viewed: bool = False) -> float:
    async def receive() -> float:
        transport = Transport()
        router = transport.router("tcp://127.0.0.1:0")
        connection.send(("ours", router.address, num))
        arrivals_s = []
        for i in range(num):
            peer, frames = await router.recv()
            message, payload = decode(frames)
            group = decode_group(expect(message, SubmitGroup), payload)
            if judged:
                judge(group, rules=RULES, publications={PUBLICATION: 0}, step=0, min_version=0)
            if viewed:
                list(group.unpack().trajectories)
            arrivals_s.append(time.perf_counter())
            if (i + 1) % ACK_EVERY == 0:
                router.send(peer, [b""])
        await asyncio.to_thread(connection.recv)
        transport.close()
        return _rate(arrivals_s)

    return asyncio.run(receive())


def receive_durable(num: int, connection: Connection) -> float:
    """Grants leases to a runner by its free slots; waits for one batch of all groups."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(RunFolder(Path(folder)).store)
        lease_table = LeaseTable(groups_per_batch=num, staleness_bound=0, num_steps=1)
        network = NetworkThread(
            network=NetworkConfig(),
            store=store,
            lease_table=lease_table,
            rules=RULES,
            timeouts=LeaseTimeouts(lease_timeout_s=60.0),
            on_death=lambda: None,
        )
        with network:
            assert report_serving(network, version=0) == PUBLICATION
            connection.send(("durable", network.control_address, num))
            network.run(network.coordinator.next_batch())
            times_s = [row[0] for row in store.query("SELECT stored_at FROM groups ORDER BY stored_at")]
            network.run(network.coordinator.drain("measured"))
            connection.recv()
        store.close()
    return _rate(times_s)


def open_ray(group: TrajectoryGroup) -> Callable[[int], float] | None:
    """Returns a function that receives through Ray; None if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        return None
    ray = importlib.import_module("ray")  # optional: typed as anything

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)

    @ray.remote
    class Sender:
        def group(self) -> TrajectoryGroup:
            return group

    sender = Sender.remote()

    def receive(num: int) -> float:
        in_flight = [sender.group.remote() for _ in range(8)]
        arrivals_s = []
        for _ in range(num):
            received = ray.get(in_flight.pop(0))
            arrivals_s.append(time.perf_counter())
            in_flight.append(sender.group.remote())
            del received
        ray.get(in_flight)
        return _rate(arrivals_s)

    return receive


def cpu_s(connection: Connection) -> float:
    """Processor seconds of both processes so far."""
    connection.send(("idle", "", 0))
    return time.process_time() + connection.recv()


def measure(*, num_rounds: int, divisor: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns (groups/s, groups per processor second of both processes), each: method → one value per round."""
    spawn = multiprocessing.get_context("spawn")
    connection, theirs = spawn.Pipe()
    sender = spawn.Process(target=send_all, args=(theirs,), daemon=True)
    sender.start()
    methods: dict[str, Callable[[int], float]] = {
        "raw": lambda num: receive_raw(num, connection),
        "raw_ours": lambda num: receive_raw(num, connection, method="raw_ours"),
        "ours": lambda num: receive_ours(num, connection),
        "judged": lambda num: receive_ours(num, connection, judged=True),
        "viewed": lambda num: receive_ours(num, connection, judged=True, viewed=True),
        "durable": lambda num: receive_durable(num, connection),
        "raw_file": lambda num: receive_raw_file(num, connection),
        "lists": lambda num: receive_lists(num, connection),
    }
    if (receive_ray := open_ray(make_group())) is not None:
        methods["ray"] = receive_ray
    rates: dict[str, list[float]] = {name: [] for name in methods}
    cpu_rates: dict[str, list[float]] = {name: [] for name in methods if name != "ray"}
    for i in range(-1, num_rounds):
        names = list(methods)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            num, before_s = max(20, NUM_GROUPS[name] // divisor), cpu_s(connection)
            rate = methods[name](num)
            if i < 0:  # the first round only warms up
                continue
            rates[name].append(rate)
            if name in cpu_rates:
                cpu_rates[name].append(num / (cpu_s(connection) - before_s))
    connection.send(None)
    sender.join()
    return rates, cpu_rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rates, cpu_rates = measure(num_rounds=3 if options.quick else options.rounds, divisor=5 if options.quick else 1)
    for name, values in rates.items():
        cpu = f"{1e6 / statistics.median(cpu_rates[name]):8.0f} us of processor each" if name in cpu_rates else ""
        print(f"{name:>9} {statistics.median(values):8.0f} groups/s   {min(values):8.0f} to {max(values):8.0f}  {cpu}")

    def ratio(one: str, other: str, values: dict[str, list[float]] = rates) -> float | None:
        if other not in values:
            return None
        return round(statistics.median(a / b for a, b in zip(values[one], values[other], strict=True)), 3)

    print(
        json.dumps(
            {
                "benchmark": "transport",
                "vs_raw": ratio("ours", "raw"),
                "vs_ray": ratio("ours", "ray"),
                "vs_lists": ratio("ours", "lists"),
                "judged_vs_raw": ratio("judged", "raw"),
                "viewed_vs_raw": ratio("viewed", "raw"),
                "vs_raw_ours": ratio("ours", "raw_ours"),
                "cpu_vs_raw": ratio("ours", "raw", cpu_rates),
                "cpu_vs_lists": ratio("ours", "lists", cpu_rates),
                "vs_raw_durable": ratio("durable", "raw"),
                "durable_vs_raw_file": ratio("durable", "raw_file"),
                "groups_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
