"""Latency of a lease, and processor time of the learner's process, with a fleet of 1,000 actors.

    python benchmarks/fleet.py [--quick] [--seconds 20] [--actors 1000] [--groups-per-s 50]

One process is the learner: a real NetworkThread, a store in a folder, and a loop that takes each complete batch and
logs it, without training. The other process simulates the actors, each with its own socket: 8 leases of 8 trajectories,
so 64,000 trajectories are in flight; heartbeats twice a second and after each group; groups of 38,697 tokens,
sent at a constant rate, oldest lease first. `lease_p99_ms`: time from sending a group to receiving the next lease; the
group is stored durably in between. `cores`: processor time of the learner's process
divided by wall time, sockets and SQLite included. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common.serving import report_serving
from benchmarks.common.synthetic import NUM_TRAJECTORIES, PUBLICATION, RUN, VOCABULARY, make_group
from learner.leases.admission import Rules
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.config import NetworkConfig
from protocol.framing import decode, encode
from protocol.messages import Heartbeat, Lease, SubmitReply
from protocol.transport import Transport

GROUP = make_group()
LEASES_EACH = 8
GROUPS_PER_BATCH = 100
HEARTBEAT_S = 0.5
SOCKETS_EACH = 500  # per zmq context, whose limit is 1,023
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Resource usage of the learner's process at wall-clock time `clock_s`."""

    cpu_s: float
    clock_s: float
    peak_bytes: int

    @classmethod
    def now(cls) -> Usage:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return cls(time.process_time(), time.perf_counter(), peak_bytes)


def learn(connection: Connection, folder: str, num_leases: int) -> None:
    """The learner's process: sends its address, then replies to each message with its resource usage."""
    store = Store(RunFolder(Path(folder)).store)
    # The bound allows twice the leases in flight, so that it never delays a lease.
    bound = 2 * num_leases // GROUPS_PER_BATCH
    lease_table = LeaseTable(groups_per_batch=GROUPS_PER_BATCH, staleness_bound=bound, num_steps=1 << 20)
    rules = Rules(RUN, NUM_TRAJECTORIES, VOCABULARY, skip_zero_variance=True)
    network = NetworkThread(
        network=NetworkConfig(),
        store=store,
        lease_table=lease_table,
        rules=rules,
        timeouts=LeaseTimeouts(lease_timeout_s=30.0),
        on_death=lambda: None,
    )
    with network:
        assert report_serving(network, version=0) == PUBLICATION
        connection.send(network.control_address)
        threading.Thread(target=take_batches, args=(network,), daemon=True).start()
        while connection.recv() is not None:
            connection.send(Usage.now())
    store.close()


def take_batches(network: NetworkThread) -> None:
    """Takes and logs batches until the network thread ends."""
    with suppress(CancelledError):
        while True:
            groups = network.run(network.coordinator.next_batch())
            network.run(network.coordinator.commit_batch([group.cursor for group in groups]))


class Actor:
    """Receives leases; `submit` sends the group of one lease."""

    def __init__(self, name: str, transport: Transport, address: str, fleet: Fleet) -> None:
        self._name = name
        self._dealer = transport.dealer(address)
        self._fleet = fleet
        self._held: set[int] = set()
        self._num_running = 0
        self._freed_s: deque[float] = deque()

    async def receive(self) -> None:
        while True:
            message, _ = decode(await self._dealer.recv())
            match message:
                case Lease():
                    self._held.add(message.lease_id)
                    self._num_running += 1
                    if self._freed_s:
                        self._fleet.waits_s.append(time.perf_counter() - self._freed_s.popleft())
                    self._fleet.leased(self, message)
                case SubmitReply():
                    assert message.outcome == "accepted", message.reason
                    self._held.discard(message.lease_id)
                    self._fleet.num_stored += 1

    async def heartbeat(self) -> None:
        message = Heartbeat(
            actor=self._name,
            incarnation="1",
            capacity=LEASES_EACH * NUM_TRAJECTORIES,
            free_slots=(LEASES_EACH - self._num_running) * NUM_TRAJECTORIES,
            held=sorted(self._held),
            counters={"running": 64.0},
        )
        await self._dealer.send([encode(message)])

    async def beat(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await self.heartbeat()
            await asyncio.sleep(HEARTBEAT_S)

    async def submit(self, lease: Lease) -> None:
        group = replace(GROUP, run_id=lease.run_id, cursor=lease.cursor, attempt=lease.attempt)
        frames = encode_group(group, lease_id=lease.lease_id)
        self._freed_s.append(time.perf_counter())
        await self._dealer.send(frames)
        self._num_running -= 1
        await self.heartbeat()


class Fleet:
    """All actors. `waits_s`: for each lease that follows a group, seconds since its actor sent the group."""

    def __init__(self, *, num_leases: int) -> None:
        self.waits_s: list[float] = []
        self.num_stored = 0
        self.full = asyncio.Event()
        self._num_leases = num_leases
        self._open: deque[tuple[Actor, Lease]] = deque()

    def leased(self, actor: Actor, lease: Lease) -> None:
        self._open.append((actor, lease))
        if len(self._open) == self._num_leases:
            self.full.set()

    async def submit(self, *, groups_per_s: float, seconds: float) -> None:
        """Sends groups at a constant rate, for the oldest leases first."""
        start_s = time.perf_counter()
        for i in range(int(seconds * groups_per_s)):
            await asyncio.sleep(start_s + i / groups_per_s - time.perf_counter())
            actor, lease = self._open.popleft()
            await actor.submit(lease)


async def play(address: str, connection: Connection, options: argparse.Namespace) -> dict[str, float]:
    """Fills the fleet with leases, warms up for a second, then measures."""
    num_transports = -(-options.actors // SOCKETS_EACH)
    transports = [Transport() for _ in range(num_transports)]
    fleet = Fleet(num_leases=LEASES_EACH * options.actors)
    actors = [Actor(f"actor-{i}", transports[i % num_transports], address, fleet) for i in range(options.actors)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(actor.receive()) for actor in actors]
        tasks += [group.create_task(actor.beat(i / len(actors) * HEARTBEAT_S)) for i, actor in enumerate(actors)]
        started_s = time.perf_counter()
        async with asyncio.timeout(START_TIMEOUT_S):
            await fleet.full.wait()
        filled_s = time.perf_counter() - started_s
        await fleet.submit(groups_per_s=options.groups_per_s, seconds=1.0)
        fleet.waits_s.clear()
        before, num_before = await asyncio.to_thread(read_usage, connection), fleet.num_stored
        await fleet.submit(groups_per_s=options.groups_per_s, seconds=options.seconds)
        after, num_after = await asyncio.to_thread(read_usage, connection), fleet.num_stored
        for task in tasks:
            task.cancel()
    for transport in transports:
        transport.close()
    clock_s = after.clock_s - before.clock_s
    median_s, p99_s = np.quantile(fleet.waits_s, [0.5, 0.99])
    return {
        "lease_p99_ms": round(1000 * float(p99_s), 2),
        "cores": round((after.cpu_s - before.cpu_s) / clock_s, 3),
        "lease_p50_ms": round(1000 * float(median_s), 2),
        "stored_per_s": round((num_after - num_before) / clock_s, 1),
        "trajectories_in_flight": LEASES_EACH * NUM_TRAJECTORIES * len(actors),
        "seconds_to_fill": round(filled_s, 1),
        "peak_mb": round(after.peak_bytes / 1e6),
    }


def read_usage(connection: Connection) -> Usage:
    connection.send("usage")
    return connection.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure for 5 seconds")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--actors", type=int, default=1_000)
    parser.add_argument("--groups-per-s", type=float, default=50.0)
    options = parser.parse_args()
    if options.quick:
        options.seconds = 5.0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    spawn = multiprocessing.get_context("spawn")
    connection, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        learner = spawn.Process(target=learn, args=(theirs, folder, options.actors * LEASES_EACH), daemon=True)
        learner.start()
        result = asyncio.run(play(connection.recv(), connection, options))
        connection.send(None)
        learner.join()
    print(json.dumps({"benchmark": "fleet", **result}))


if __name__ == "__main__":
    main()
