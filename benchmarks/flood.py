"""Memory of a learner, and rate of its run, while one process floods it.

    python benchmarks/flood.py [--quick] [--messages 1000000] [--seconds 5]

The learner is a real NetworkThread with a store in a process of its own; an honest actor in another process sends
heartbeats and waits for the reply to each. Each kind of flood runs in a third process, on loopback, without keys:

small      valid heartbeats without free slots, `--messages` of them, over one connection
reconnect  a new connection and a new name for every 100 heartbeats
large      messages of 1 MB that are no messages
deaf       heartbeats whose replies are never read
half       frames of 64 KiB of a message that never ends

Intervals without and with flood alternate. `rate_ratio`: the lowest ratio of an interval with flood to the mean of its
two neighbours without. `growth_mb`: peak resident memory of the learner minus that before the floods. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protocol.framing import encode
from protocol.messages import EngineFields, Heartbeat
from protocol.resident_memory import resident_mb
from protocol.weight_messages import EngineReport
from tests.network.peers import Actor, Setting, open_network
from tests.protocol.zmtp import connect_zmtp, zmtp_frame

KINDS = ("small", "reconnect", "large", "deaf", "half")
SAMPLE_S = 0.01
# Below the rate limit of a peer.
PAUSE_S = 0.002


def learn(connection: Connection, folder: str) -> None:
    """Sends its address; replies to every message with (resident MB now, peak since the last message)."""
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

        threading.Thread(target=watch, daemon=True).start()
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


def flood(kind: str, address: str, num: int, num_sent: Synchronized[int]) -> None:
    """Sends `num` messages, and reconnects when the learner closes the connection. Runs until it is killed."""
    messages = _messages(kind)
    while num_sent.value < num:
        with suppress(OSError), ExitStack() as stack:
            connection = stack.enter_context(connect_zmtp(address))
            for _ in range(100 if kind == "reconnect" else num):
                _drain(connection, reads=kind != "deaf")
                connection.sendall(next(messages))
                num_sent.value += 1
    time.sleep(3600)


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


def measure(address: str, num_done: Synchronized[int], seconds: float) -> float:
    """Replies per second to the honest actor."""
    before, started_s = num_done.value, time.perf_counter()
    time.sleep(seconds)
    return (num_done.value - before) / (time.perf_counter() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    seconds = 2.0 if options.quick else options.seconds
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        learner = context.Process(target=learn, args=(theirs, folder), daemon=True)
        learner.start()
        address = ours.recv()
        num_done = context.Value("q", 0)
        actor = context.Process(target=act, args=(address, num_done), daemon=True)
        actor.start()
        while num_done.value < 100:
            time.sleep(SAMPLE_S)
        ours.send("memory")
        start_mb, _ = ours.recv()
        results = {}
        base = measure(address, num_done, seconds)
        for kind in KINDS:
            num_sent = context.Value("q", 0)
            hostile = context.Process(target=flood, args=(kind, address, options.messages, num_sent), daemon=True)
            hostile.start()
            while not num_sent.value:
                time.sleep(SAMPLE_S)
            rate = measure(address, num_done, seconds)
            hostile.kill()
            hostile.join()
            ours.send("memory")
            _, peak_mb = ours.recv()
            after = measure(address, num_done, seconds)
            results[kind] = {
                "growth_mb": round(peak_mb - start_mb, 1),
                "rate_ratio": round(rate / ((base + after) / 2), 3),
                "sent": num_sent.value,
            }
            print(kind, results[kind], flush=True)
            base = after
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
