"""Measures the share of trajectory slots that are busy if episode lengths differ, against leases by whole groups.

    python benchmarks/occupancy.py [--quick] [--table] [--rounds 3] [--mean-s 1.0]

    NetworkThread + store (a process) ◄── ZeroMQ ──► 4 × (Runner, GroupRollout, Episodes, Session) ──► waiting generator

Everything but the generator is the code of a run. An episode is one generation that lasts a log-uniform time; `spread`
is the ratio of the longest to the shortest. Lengths are the same for both rules. A slot is busy while an episode runs
in it. Measured over 12 mean episode durations after 4 of warm-up, rules interleaved, median of the rounds.

rule `slots`   the actor's: each trajectory that ends gives its slot back
rule `groups`  the baseline: a group keeps its G slots until its last trajectory ends, as when actors reported
               max_trajectories // G groups as their capacity

The learner takes no time for a step. In the main measurement the staleness bound is so large (16 batches of 16 groups)
that it never delays a lease. --table adds other G and spreads, and batches of 32 groups (as many trajectories as slots)
at bounds of 1 to 4.
The heartbeat interval is 2 % of the mean episode duration, as with 0.5 s and episodes of 25 s.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from actor.chat.tokenizer import Tokenizer
from actor.engines.completion import Completion, Finish, Span
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.rewards.reward import Reward, Score
from actor.rollout import Episodes, GroupRollout
from actor.runner import Runner
from actor.session import Session
from actor.tasks.task import Task
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.workflows.workflow import Workflow
from benchmarks.common.serving import report_serving
from learner.leases.admission import Rules
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.config import NetworkConfig
from protocol.config_base import Options
from protocol.errors import PalimpsestError
from protocol.messages import EngineFields, Lease
from protocol.transport import Transport
from protocol.types import PolicyTag, Question, Trajectory, TrajectoryGroup

RUN = "benchmark"
VOCABULARY = 200
NUM_ACTORS, SLOTS_EACH = 4, 64
WARM, MEASURED, HEARTBEAT = 4.0, 12.0, 0.02  # in mean episode durations
FOREVER_S = 3_600.0
RULES = ("slots", "groups")


@dataclass(frozen=True, slots=True)
class Setting:
    group_size: int = 8
    spread: float = 30.0
    groups_per_batch: int = 16
    staleness_bound: int = 16

    def duration(self, rid: str, mean_s: float) -> float:
        """Seconds of an episode: log-uniform over [1, spread], scaled to the mean. Depends on `rid` only."""
        rng = np.random.default_rng(list(rid.encode()))
        mean = (self.spread - 1) / math.log(self.spread)
        return mean_s * self.spread ** rng.random() / mean


def learn(connection: Connection, setting: Setting) -> None:
    """The learner's process: trains each batch at once; an engine serves each version at once."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(RunFolder(Path(folder)).store)
        lease_table = LeaseTable(
            groups_per_batch=setting.groups_per_batch, staleness_bound=setting.staleness_bound, num_steps=1 << 20
        )
        network = NetworkThread(
            network=NetworkConfig(),
            store=store,
            lease_table=lease_table,
            rules=Rules(RUN, setting.group_size, VOCABULARY, skip_zero_variance=False),
            timeouts=LeaseTimeouts(lease_timeout_s=FOREVER_S),
            on_death=lambda: None,
        )
        with network:
            report_serving(network, version=0)
            connection.send(network.control_address)
            threading.Thread(target=train, args=(network,), daemon=True).start()
            connection.recv()
        store.close()


def train(network: NetworkThread) -> None:
    """Takes, logs and publishes batches until the network thread ends."""
    with suppress(CancelledError, PalimpsestError):
        for version in range(1, 1 << 20):
            groups = network.run(network.coordinator.next_batch())
            network.run(network.coordinator.commit_batch([group.cursor for group in groups]))
            report_serving(network, version=version)


class WaitingEngine:
    """Implements `Generator`: waits for the duration of the episode, then returns one token."""

    def __init__(self, setting: Setting, mean_s: float) -> None:
        self._setting, self._mean_s = setting, mean_s
        self._newest = EngineFields(name="none", url="", version=-1, publication=-1)
        self._updated = asyncio.Event()
        self._num_busy = 0
        self._changed_s = 0.0
        self.busy_s = 0.0
        self.num_done = 0

    def set_engines(self, engines: Sequence[EngineFields]) -> None:
        self._newest = max([*engines, self._newest], key=lambda engine: engine.version)
        self._updated.set()

    def read_busy_s(self) -> float:
        """Sum over slots of the seconds in which they were busy."""
        self._count(0)
        return self.busy_s

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion:
        while self._newest.version < min_version:
            self._updated.clear()
            await self._updated.wait()
        self._count(1)
        tag = str(PolicyTag(RUN, self._newest.publication, self._newest.version))
        try:
            await asyncio.sleep(self._setting.duration(rid, self._mean_s))
        finally:
            self._count(-1)
        self.num_done += 1
        one = np.array([3], dtype=np.int32)
        return Completion(
            one, np.array([-1.0], dtype=np.float32), Finish("length"), (Span(0, 1, tag),), len(input_ids), 0
        )

    def _count(self, change: int) -> None:
        now_s = time.perf_counter()
        self.busy_s += self._num_busy * (now_s - self._changed_s)
        self._num_busy, self._changed_s = self._num_busy + change, now_s


class OneGeneration(Workflow):
    async def run(self, question: Question, session: Session) -> Episode:
        session.open_context([3])
        await session.generate(1)
        return Episode(answer="answer")


class Constant(Reward):
    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        return Score(1.0)


class Numbered(Task):
    def question(self, cursor: int) -> Question:
        return Question(f"q{cursor}", "?", ("answer",))


def rollout_of(rule: str, engine: WaitingEngine, tokenizer: Tokenizer):
    episodes = Episodes(
        workflow=OneGeneration(Options(), tools={}, context_tokens=8),
        reward=Constant(Options()),
        pool=engine,
        tokenizer=tokenizer,
        sampling=SamplingParams(),
        run_id=RUN,
        max_context_tokens=8,
        max_trajectories=SLOTS_EACH,
    )
    by_slots = GroupRollout(task=Numbered(Options(), split="train", seed=0), episodes=episodes)

    async def by_groups(lease: Lease, on_trajectory_end: Callable[[], None]) -> TrajectoryGroup:
        return await by_slots(lease)

    return by_slots if rule == "slots" else by_groups


async def play(address: str, rule: str, setting: Setting, *, mean_s: float, tokenizer: Tokenizer) -> dict[str, float]:
    """Runs the actors. Returns the occupancy and the trajectories per second of the measured interval."""
    transport = Transport()
    engine = WaitingEngine(setting, mean_s)
    runners = [
        Runner(
            name=f"actor-{i}",
            capacity=SLOTS_EACH,
            dealer=transport.dealer(address),
            rollout=rollout_of(rule, engine, tokenizer),
            on_engines=engine.set_engines,
            counters=dict,
            heartbeat_s=HEARTBEAT * mean_s,
            min_heartbeat_s=0.1 * HEARTBEAT * mean_s,
        )
        for i in range(NUM_ACTORS)
    ]
    tasks = [asyncio.create_task(runner.run()) for runner in runners]
    await asyncio.sleep(WARM * mean_s)
    start_s, busy_s, num_done = time.perf_counter(), engine.read_busy_s(), engine.num_done
    await asyncio.sleep(MEASURED * mean_s)
    seconds = time.perf_counter() - start_s
    occupancy = (engine.read_busy_s() - busy_s) / (seconds * NUM_ACTORS * SLOTS_EACH)
    rate = (engine.num_done - num_done) / seconds
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.wait(tasks)
    transport.close()
    return {"occupancy": occupancy, "trajectories_per_s": rate}


def measure(rule: str, setting: Setting, *, mean_s: float, tokenizer: Tokenizer) -> dict[str, float]:
    spawn = multiprocessing.get_context("spawn")
    connection, theirs = spawn.Pipe()
    learner = spawn.Process(target=learn, args=(theirs, setting), daemon=True)
    learner.start()
    result = asyncio.run(play(connection.recv(), rule, setting, mean_s=mean_s, tokenizer=tokenizer))
    connection.send(None)
    learner.join()
    return result


def compare(setting: Setting, *, rounds: int, mean_s: float, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Rule → medians over the rounds. The rules alternate."""
    results: dict[str, list[dict[str, float]]] = {rule: [] for rule in RULES}
    for _ in range(rounds):
        for rule in RULES:
            results[rule].append(measure(rule, setting, mean_s=mean_s, tokenizer=tokenizer))
    medians = {
        rule: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for rule, found in results.items()
    }
    cells = [f"{rule} {medians[rule]['occupancy']:.3f}" for rule in RULES]
    print(f"{setting}: {', '.join(cells)}", flush=True)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, episodes of 0.5 s")
    parser.add_argument("--table", action="store_true", help="also other group sizes, spreads and staleness bounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mean-s", type=float, default=1.0)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.mean_s = 1, 0.5
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer.load(Path(folder))
    main_result = compare(Setting(), rounds=options.rounds, mean_s=options.mean_s, tokenizer=tokenizer)
    if options.table:
        shapes = [Setting(group_size=size, groups_per_batch=128 // size) for size in (4, 16)]
        shapes += [Setting(spread=spread) for spread in (10.0, 100.0)]
        shapes += [Setting(groups_per_batch=32, staleness_bound=bound) for bound in (1, 2, 4)]
        for setting in shapes:
            compare(setting, rounds=1, mean_s=options.mean_s, tokenizer=tokenizer)
    rates = {rule: main_result[rule]["trajectories_per_s"] for rule in RULES}
    print(
        json.dumps(
            {
                "benchmark": "occupancy",
                "occupancy": round(main_result["slots"]["occupancy"], 4),
                "baseline": round(main_result["groups"]["occupancy"], 4),
                "trajectories_per_s_over_baseline": round(rates["slots"] / rates["groups"], 3),
                "trajectories_per_s": round(rates["slots"], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
