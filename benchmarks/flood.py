"""Memory of a learner, and rate of its run, while one process floods it.

    python benchmarks/flood.py [--quick] [--kinds small half] [--messages 1000000] [--seconds 2] [--max-seconds 60]

The learner is a real NetworkThread with a store, in a separate process; an honest actor in another process sends
heartbeats and waits for the reply to each. Each kind of flood runs in a third process, on loopback, without keys:

busy       no messages: the process only computes, which shows what the loss of a core costs
small      valid heartbeats without free slots over one connection
reconnect  a new connection and a new name for every 100 heartbeats
large      messages of 1 MB that are no messages
deaf       heartbeats whose replies are never read
half       frames of 64 KiB of a message that never ends

Intervals of `--seconds` without and with flood alternate until `--messages` are sent, for at most `--max-seconds` of
flood; `sent` states how many were. `rate_ratio`: for each interval with flood, the honest actor's rate of replies
divided by the mean of the two intervals beside it; the median. `growth_mb`: the learner's peak resident memory minus
that before the first flood. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import select
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protocol.framing import encode
from protocol.messages import EngineFields, Heartbeat
from protocol.resident_memory import resident_mb
from protocol.weight_messages import EngineReport
from tests.network.peers import Actor, Setting, open_network
from tests.protocol.zmtp import connect_zmtp, zmtp_frame

KINDS = ("busy", "small", "reconnect", "large", "deaf", "half")
SAMPLE_S = 0.01
# Below the rate limit of a peer.
PAUSE_S = 0.002
# Before each interval: the learner handles what is queued, and closes connections.
SETTLE_S = 0.3


class Result(TypedDict):
    """What one kind of flood did to the learner; MB are 1e6 bytes."""

    growth_mb: float
    rate_ratio: float
    lowest_ratio: float
    intervals: int
    sent: int


def learn(connection: Connection, folder: str, computes: bool = False) -> None:
    """Sends its address; replies to every message with (resident MB now, peak since the last message).

    computes: a thread computes all the time and shares the interpreter lock with the network thread.
    """
    setting = Setting(Path(folder), groups_per_batch=4, num_steps=1 << 20)
    with open_network(setting) as network:
        publication = network.run(network.coordinator.new_publication(0))
        fields = EngineFields(name="engine-0", url="http://127.0.0.1:1", version=0, publication=publication)
        report = EngineReport(request_id=1, engine=fields, state="serving", counters={})
        peak, stop = [0.0], threading.Event()

        def watch() -> None:
            while not stop.wait(SAMPLE_S):
                peak[0] = max(peak[0], resident_mb())
                network.engines.report(report, now_s=time.monotonic())

        def compute() -> None:
            while not stop.is_set():
                sum(range(10_000))

        threading.Thread(target=watch, daemon=True).start()
        if computes:
            threading.Thread(target=compute, daemon=True).start()
        connection.send(network.control_address)
        while connection.recv() == "memory":
            connection.send((resident_mb(), peak[0]))
            peak[0] = 0.0
        stop.set()


def act(address: str, num_done: Synchronized[int]) -> None:
    """An honest actor: the next heartbeat follows PAUSE_S after the reply to the last one."""

    async def run() -> None:
        async with Actor(address, name="honest") as actor:
            while True:
                with suppress(TimeoutError):
                    await actor.until_status()
                    with num_done.get_lock():
                        num_done.value += 1
                await asyncio.sleep(PAUSE_S)

    asyncio.run(run())


def heartbeat(name: str) -> bytes:
    return encode(Heartbeat(actor=name, incarnation="1", capacity=1, free_slots=0, held=[]))


def flood(kind: str, address: str, running: Event, num_sent: Synchronized[int]) -> None:
    """Sends messages while `running` is set, and reconnects when the learner closes the connection."""
    messages = _messages(kind)
    while running.wait():
        if kind == "busy":
            num_sent.value += sum(range(100_000)) > 0
            continue
        with suppress(OSError), ExitStack() as stack:
            connection = stack.enter_context(connect_zmtp(address, timeout_s=2.0))
            for _ in range(100 if kind == "reconnect" else 1 << 62):
                _drain(connection, reads=kind != "deaf")
                connection.sendall(next(messages))
                num_sent.value += 1
                if not running.is_set():
                    break


def _messages(kind: str) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        match kind:
            case "small" | "deaf":
                yield zmtp_frame(heartbeat("flood"))
            case "reconnect":
                yield zmtp_frame(heartbeat(f"flood-{number // 100}"))
            case "large":
                yield zmtp_frame(bytes(1_000_000))
            case _:
                yield zmtp_frame(bytes(65_536), more=True)


def _drain(connection: socket.socket, *, reads: bool) -> None:
    if reads and select.select([connection], [], [], 0)[0]:
        connection.recv(1 << 16)


@dataclass(frozen=True, slots=True)
class Hostile:
    """The process that floods."""

    running: Event
    num_sent: Synchronized[int]


@dataclass(slots=True)
class Stage:
    """The learner, the honest actor and the intervals of one benchmark."""

    address: str
    learner: Connection
    num_done: Synchronized[int]
    context: SpawnContext
    seconds: float

    def rate(self) -> float:
        """Replies per second to the honest actor, after what was queued before is handled."""
        time.sleep(SETTLE_S)
        before, started_s = self.num_done.value, time.perf_counter()
        time.sleep(self.seconds)
        return (self.num_done.value - before) / (time.perf_counter() - started_s)

    def memory(self) -> tuple[float, float]:
        """Returns the learner's resident MB now, and the peak since the last call."""
        self.learner.send("memory")
        return self.learner.recv()

    def until_served(self, num: int, *, timeout_s: float) -> None:
        """Waits until the honest actor has received `num` more replies. Raises: TimeoutError."""
        target, deadline_s = self.num_done.value + num, time.monotonic() + timeout_s
        while self.num_done.value < target:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the honest actor must get {num} replies in {timeout_s:g} s")
            time.sleep(SAMPLE_S)

    @contextmanager
    def hostile(self, kind: str) -> Iterator[Hostile]:
        """A process that floods the learner while `running` is set."""
        hostile = Hostile(self.context.Event(), self.context.Value("q", 0))
        arguments = (kind, self.address, hostile.running, hostile.num_sent)
        process = self.context.Process(target=flood, args=arguments, daemon=True)
        process.start()
        try:
            yield hostile
        finally:
            process.kill()
            process.join()

    def measure(self, kind: str, *, num_messages: int, max_seconds: float, start_mb: float) -> Result:
        """Alternates intervals without and with flood until `num_messages` are sent or for `max_seconds` of flood."""
        with self.hostile(kind) as hostile:
            self.memory()
            ratios = self._ratios(hostile, num_messages=num_messages, max_seconds=max_seconds)
        return {
            "growth_mb": round(self.memory()[1] - start_mb, 1),
            "rate_ratio": round(statistics.median(ratios), 3),
            "lowest_ratio": round(min(ratios), 3),
            "intervals": len(ratios),
            "sent": 0 if kind == "busy" else hostile.num_sent.value,
        }

    def _ratios(self, hostile: Hostile, *, num_messages: int, max_seconds: float) -> list[float]:
        running, num_sent = hostile.running, hostile.num_sent
        ratios: list[float] = []
        base = self.rate()
        while not ratios or (num_sent.value < num_messages and len(ratios) * self.seconds < max_seconds):
            num_before = num_sent.value
            running.set()
            while num_sent.value == num_before:
                time.sleep(SAMPLE_S)
            flooded = self.rate()
            running.clear()
            after = self.rate()
            ratios.append(flooded / ((base + after) / 2))
            base = after
        return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four intervals of 1 s of each kind")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--max-seconds", type=float, default=60.0)
    options = parser.parse_args()
    seconds, max_seconds = (1.0, 4.0) if options.quick else (options.seconds, options.max_seconds)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        learner = context.Process(target=learn, args=(theirs, folder), daemon=True)
        learner.start()
        address = ours.recv()
        num_done = context.Value("q", 0)
        actor = context.Process(target=act, args=(address, num_done), daemon=True)
        actor.start()
        stage = Stage(address, ours, num_done, context, seconds)
        stage.until_served(100, timeout_s=60.0)
        start_mb, _ = stage.memory()
        results: dict[str, Result] = {}
        for kind in options.kinds:
            results[kind] = stage.measure(
                kind, num_messages=options.messages, max_seconds=max_seconds, start_mb=start_mb
            )
            print(kind, results[kind], flush=True)
        ours.send("stop")
        learner.join(10)
        actor.kill()
    summary = {
        "growth_mb": max(result["growth_mb"] for result in results.values()),
        "rate_ratio": min(result["rate_ratio"] for result in results.values()),
        "kinds": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
