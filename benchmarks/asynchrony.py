"""Compares trajectories/s at staleness bounds η = 1, 2, 4 with η = 0; measures over-age tokens and length bias.

    python benchmarks/asynchrony.py [--quick] [--steps 24] [--mean-s 0.5]

    NetworkThread + store (a process) ◄── ZeroMQ ──► 4 Runners ── HTTP ──► an engine of 64 slots
                              ◄────────────── ZeroMQ ───────────── its agent: reports, announcements

No model runs: a token takes a fixed time, so an episode's duration is proportional to its length, which is log-normal
with a 30-fold spread from the 1st to the 99th percentile. B = 16 groups of 8. A learner step takes 10 % of the mean
episode duration, the commit of a version on an engine 5 %. The engine samples during a commit; requests in flight
continue with the new version. Rewards are 0 or 1 with equal probability, so one group in 128 is skipped for zero
variance. The questions and lengths are the same at every η; the rate is measured from the 5th step on. The ratio of
heartbeat interval to episode duration is the same as in a run with long episodes.

masked_fraction  fraction of the trained tokens that are older than η (the largest over all η)
ks_p             p-value of a two-sample Kolmogorov-Smirnov test of trained lengths against all generated lengths,
                 trained or not (the smallest over all η)

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors.numpy import save as save_safetensors

from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.runner import Runner
from benchmarks.common.simulated_engine import VOCABULARY, Addresses, Engine
from learner.leases.admission import Rules
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.config import NetworkConfig
from protocol.messages import Lease
from protocol.transport import Transport
from protocol.types import Context, PolicyTag, Question, Trajectory, TrajectoryGroup, VersionSpan

RUN = "benchmark"
GROUPS_PER_BATCH, GROUP_SIZE, NUM_RUNNERS = 16, 8, 4
BOUNDS = (0, 1, 2, 4)
NUM_WARM_STEPS = 5
MEAN_TOKENS, NUM_PROMPT = 200, 8
SIGMA = math.log(30.0) / (2 * 2.3263)  # of log-lengths; 1st and 99th percentile: median ± 2.3263 SIGMA
STEP, COMMIT, HEARTBEAT = 0.1, 0.05, 0.02  # as fractions of the mean episode duration


def draw(cursor: int) -> tuple[list[int], list[float]]:
    """Lengths in tokens and rewards of a question's trajectories."""
    rng = np.random.default_rng([17, cursor])
    lengths = np.exp(math.log(MEAN_TOKENS) - SIGMA**2 / 2 + SIGMA * rng.normal(size=GROUP_SIZE))
    return np.maximum(1, lengths.round()).astype(int).tolist(), rng.integers(0, 2, GROUP_SIZE).astype(float).tolist()


@dataclass(frozen=True, slots=True)
class Measurements:
    """Made by the learner: the rate after the warm-up steps; tokens and trajectory lengths of all steps."""

    trajectories_per_s: float
    num_tokens: int
    num_over_age: int
    max_age: int
    lengths: list[int]


def learn(connection: Connection, staleness_bound: int, num_steps: int, mean_s: float) -> None:
    """Runs in the learner's process: takes batches, sleeps for the duration of a step, logs and publishes."""
    weights = save_safetensors({"weight": np.zeros(4, dtype=np.float32)})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(RunFolder(Path(folder)).store)
        lease_table = LeaseTable(
            groups_per_batch=GROUPS_PER_BATCH,
            staleness_bound=staleness_bound,
            num_steps=num_steps + staleness_bound + 1,  # leases are issued ahead also for the last steps
        )
        network = NetworkThread(
            network=NetworkConfig(),
            store=store,
            lease_table=lease_table,
            rules=Rules(RUN, GROUP_SIZE, VOCABULARY, skip_zero_variance=True),
            timeouts=LeaseTimeouts(lease_timeout_s=60.0),
            on_death=lambda: None,
        )
        with network:
            coordinator, publisher = network.coordinator, network.publisher
            connection.send(Addresses(coordinator.address, publisher.weights_address, publisher.announce_address))
            network.publish(weights, version=0)
            finished_s, batches = [], []
            for step in range(num_steps):
                batch = network.run(coordinator.next_batch())
                time.sleep(STEP * mean_s)
                network.run(coordinator.commit_batch([group.cursor for group in batch]))
                network.publish(weights, version=step + 1)
                finished_s.append(time.perf_counter())
                batches.append(batch)
            network.run(coordinator.drain("measured"))
            connection.send(_trained(batches, finished_s, staleness_bound=staleness_bound))
            connection.recv()
        store.close()


def _trained(
    batches: Sequence[Sequence[TrajectoryGroup]], finished_s: Sequence[float], *, staleness_bound: int
) -> Measurements:
    ages, sizes = [], []
    for step, batch in enumerate(batches):
        spans = [span for group in batch for context in group.contexts() for span in context.policy_versions]
        ages += [step - span.version for span in spans]
        sizes += [span.end - span.start for span in spans]
    num_measured = len(batches) - NUM_WARM_STEPS
    return Measurements(
        trajectories_per_s=num_measured
        * GROUPS_PER_BATCH
        * GROUP_SIZE
        / (finished_s[-1] - finished_s[NUM_WARM_STEPS - 1]),
        num_tokens=sum(sizes),
        num_over_age=sum(size for age, size in zip(ages, sizes, strict=True) if age > staleness_bound),
        max_age=max(ages),
        lengths=[t.num_trained_tokens for batch in batches for group in batch for t in group.trajectories],
    )


class Rollout:
    """The rollout of a lease: one generation per episode, with the question's lengths."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    async def __call__(self, lease: Lease, _: Callable[[], None]) -> TrajectoryGroup:
        lengths, rewards = draw(lease.cursor)
        episodes = [self._episode(length, min_version=lease.min_version) for length in lengths]
        contexts = await asyncio.gather(*episodes)
        trajectories = tuple(Trajectory((context,), reward) for context, reward in zip(contexts, rewards, strict=True))
        question = Question(id=f"q{lease.cursor}", text="?", answers=("!",))
        return TrajectoryGroup(lease.run_id, lease.cursor, lease.attempt, question, trajectories)

    async def _episode(self, length: int, *, min_version: int) -> Context:
        sampling = SamplingParams(max_new_tokens=length)
        completion = await self._pool.generate([1] * NUM_PROMPT, sampling, min_version=min_version)
        spans = []
        for span in completion.spans:
            tag = PolicyTag.parse(span.weight_version)
            spans.append(VersionSpan(span.start + NUM_PROMPT, span.end + NUM_PROMPT, tag.version, tag.publication))
        prompt = np.ones(NUM_PROMPT, dtype=np.int32)
        return Context(
            token_ids=np.concatenate([prompt, completion.token_ids]),
            loss_mask=np.arange(NUM_PROMPT + length) >= NUM_PROMPT,
            behavior_logprobs=np.concatenate([np.zeros(NUM_PROMPT, dtype=np.float32), completion.logprobs]),
            policy_versions=tuple(spans),
        )


async def roll_out(addresses: Addresses, *, staleness_bound: int, mean_s: float) -> list[int]:
    """Runs engine and actors until the learner drains them. Returns the lengths of all started generations."""
    engine = Engine(token_s=mean_s / MEAN_TOKENS, commit_s=COMMIT * mean_s)
    http, url = await engine.serve()
    transport = Transport()
    async with EnginePool(run_id=RUN) as pool:
        agent = asyncio.create_task(engine.follow(transport, addresses, url))
        runners = [
            Runner(
                name=f"actor-{i}",
                # One batch more than the leases that the bound allows.
                capacity=2 * (staleness_bound + 2) * GROUPS_PER_BATCH * GROUP_SIZE // NUM_RUNNERS,
                dealer=transport.dealer(addresses.control),
                rollout=Rollout(pool),
                on_engines=lambda engines: pool.set_engines([EngineInfo(each.url, each.version) for each in engines]),
                counters=dict,
                heartbeat_s=HEARTBEAT * mean_s,
            )
            for i in range(NUM_RUNNERS)
        ]
        await asyncio.gather(*(runner.run() for runner in runners))
        agent.cancel()
    transport.close()
    await http.cleanup()
    return engine.lengths


def ks_p(one: Sequence[int], other: Sequence[int]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test (asymptotic)."""
    values = np.union1d(one, other)
    distance = np.abs(
        np.searchsorted(np.sort(one), values, "right") / len(one)
        - np.searchsorted(np.sort(other), values, "right") / len(other)
    ).max()
    size = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    scaled = (size + 0.12 + 0.11 / size) * distance
    terms = [(-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)]
    return 1.0 if scaled < 0.2 else min(1.0, max(0.0, 2 * math.fsum(terms)))


def measure(staleness_bound: int, *, num_steps: int, mean_s: float) -> tuple[Measurements, list[int]]:
    """Returns (the learner's measurements, all generated lengths)."""
    spawn = multiprocessing.get_context("spawn")
    connection, theirs = spawn.Pipe()
    learner = spawn.Process(target=learn, args=(theirs, staleness_bound, num_steps, mean_s), daemon=True)
    learner.start()
    generated = asyncio.run(roll_out(connection.recv(), staleness_bound=staleness_bound, mean_s=mean_s))
    trained = connection.recv()
    connection.send(None)
    learner.join()
    return trained, generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 steps, episodes of 0.15 s")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--mean-s", type=float, default=0.5)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.mean_s = 10, 0.15
    rates, masked, probabilities = {}, [], []
    for bound in BOUNDS:
        trained, generated = measure(bound, num_steps=options.steps, mean_s=options.mean_s)
        rates[bound] = trained.trajectories_per_s
        masked.append(trained.num_over_age / trained.num_tokens)
        probabilities.append(ks_p(trained.lengths, generated))
        print(
            f"eta {bound}: {rates[bound]:7.1f} trajectories/s, {rates[bound] / rates[0]:.2f} of eta 0, "
            f"largest age {trained.max_age}, masked {masked[-1]:.4%}, KS p {probabilities[-1]:.3f} "
            f"({len(trained.lengths)} trained, {len(generated)} generated)",
            flush=True,
        )
    print(
        json.dumps(
            {
                "benchmark": "asynchrony",
                **{f"eta_{bound}_over_0": round(rates[bound] / rates[0], 3) for bound in (4, 2, 1)},
                "masked_fraction": max(masked),
                "ks_p": round(min(probabilities), 4),
                "trajectories_per_s": {str(bound): round(rate, 1) for bound, rate in rates.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
