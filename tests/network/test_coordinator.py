"""The coordinator over real sockets and a real store: leases, groups and refusals."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.leases import received_groups
from learner.leases.entries import State
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.framing import encode
from protocol.types import Status
from protocol.weight_messages import EngineReply
from tests.leases.groups import GROUP_SIZE, RUN, make_group
from tests.network.peers import Actor, Setting, commit_batch, next_batch, open_network, report_engine, serve_version


def num_stored(setting: Setting, state: State) -> int:
    """Returns the number of stored questions in a state."""
    with closing(Store(RunFolder(setting.folder).store, read_only=True)) as store:
        return store.query("SELECT count(*) FROM entries WHERE state = ?", state.value)[0][0]


async def test_no_lease_before_an_engine_serves(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        async with Actor(network.control_address) as actor:
            status = await actor.until_status()
            assert (status.run_id, status.step, status.num_steps, status.engines) == (RUN, 0, 3, [])
            await report_engine(network, version=-1, publication=-1, state="joining")
            await actor.until_status()
            assert actor.leases == []
            await serve_version(network, 0)
            leases = await actor.until_leased(4)
            assert [(lease.cursor, lease.attempt, lease.group_size) for lease in leases] == [
                (cursor, 0, GROUP_SIZE) for cursor in range(4)
            ]
            assert [engine.version for engine in (await actor.until_status()).engines] == [0]


async def test_leases_follow_free_slots(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        address = network.control_address
        async with Actor(address, capacity=2) as small, Actor(address, name="actor-1", capacity=4) as large:
            await small.until_leased(1)
            await large.until_leased(2)
            await small.until_status()
            assert (len(small.leases), len(large.leases)) == (1, 2)
            assert (await small.answer(small.leases[0])).outcome == "accepted"
            await small.until_leased(2)
            assert len({lease.lease_id for lease in small.leases + large.leases}) == 4


async def test_a_run_reaches_its_last_step(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_network(setting) as network:
        async with Actor(network.control_address) as actor:
            for step in range(3):
                await serve_version(network, step)
                await actor.until_leased(min(4 + 2 * step, 6))
                for lease in actor.leases[2 * step : 2 * step + 2][::-1]:
                    group = make_group(lease, version=step, publication=step + 1)
                    assert (await actor.submit(group, lease_id=lease.lease_id)).outcome == "accepted"
                    actor.held.discard(lease.lease_id)
                batch = await next_batch(network)
                assert [group.cursor for group in batch] == [2 * step, 2 * step + 1]
                await commit_batch(network, batch)
            await asyncio.to_thread(network.run, network.coordinator.drain("done"))
            await actor.until(lambda: bool(actor.drains))
            assert actor.drains[0].reason == "done"
    audit = audit_run(tmp_path)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_trained, audit.num_running, audit.num_groups_lost) == (3, 6, 0, 0)
    assert audit.staleness_max == 0


async def test_a_group_that_is_sent_again_is_a_duplicate(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            first, *_ = await actor.until_leased(4)
            assert (await actor.answer(first)).outcome == "accepted"
            for _ in range(3):
                assert (await actor.answer(first)).outcome == "duplicate"
            assert num_stored(setting, State.BUFFERED) == 1
            with closing(Store(RunFolder(tmp_path).store, read_only=True)) as store:
                assert store.group(first.cursor).question == make_group(first).question
            assert len(actor.leases) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": 1}, "a group must have 2 trajectories, got 1"),
        ({"token": 50}, "token ids must be below the vocabulary size 50, got 50"),
        ({"publication": 9}, "publication 9 of version 0 is not known"),
        ({"version": 1}, "publication 1 of version 1 is not known"),
    ],
)
async def test_refused_groups_are_issued_again(tmp_path: Path, change: dict[str, int], says: str) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            first, *_ = await actor.until_leased(4)
            bad = make_group(
                first,
                version=change.get("version", 0),
                publication=change.get("publication", 1),
                token=change.get("token", 3),
            )
            bad = replace(bad, trajectories=bad.trajectories[: change.get("size", GROUP_SIZE)])
            reply = await actor.submit(bad, lease_id=first.lease_id)
            assert reply.outcome == "refused"
            assert says in reply.reason
            await actor.until(lambda: len(actor.leases) == 5)
            again = actor.leases[-1]
            assert (again.cursor, again.attempt) == (first.cursor, 1)
            assert again.lease_id not in {lease.lease_id for lease in actor.leases[:4]}
            assert (await actor.answer(again)).outcome == "accepted"


async def test_malformed_columns_are_refused_and_issued_again(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            first, *_ = await actor.until_leased(4)
            frames = encode_group(make_group(first), lease_id=first.lease_id)
            frames[3] = np.full(4, np.nan, dtype=np.float32).tobytes()
            await actor.dealer.send(frames)
            await actor.until(lambda: len(actor.leases) == 5)
            assert actor.replies[0].outcome == "refused"
            assert "behavior_logprobs must be finite" in actor.replies[0].reason


async def test_groups_that_were_never_leased_are_refused_without_effect(tmp_path: Path) -> None:
    """Groups of another run, an unknown question, another question's lease or a future lease: refused."""
    setting = Setting(tmp_path)
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            leases = list(await actor.until_leased(4))
            group = make_group(leases[0])
            for foreign, lease_id in (
                (replace(group, run_id="other"), leases[0].lease_id),
                (replace(group, cursor=99), leases[0].lease_id),
                (group, leases[1].lease_id),
                (group, 99),
            ):
                reply = await actor.submit(foreign, lease_id=lease_id)
                assert (reply.outcome, reply.lease_id) == ("refused", lease_id)
                assert "never" in reply.reason
            for lease in leases:
                assert (await actor.answer(lease)).outcome == "accepted"
            reply = await actor.submit(group, lease_id=98)
            assert reply.outcome == "refused"
            assert num_stored(setting, State.BUFFERED) == 4


async def test_a_question_is_skipped_after_max_failures(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address, capacity=1) as actor:
            await actor.until_leased(1)
            for attempt in range(received_groups.MAX_FAILURES):
                lease = actor.leases[-1]
                assert (lease.cursor, lease.attempt) == (0, attempt)
                failed = replace(make_group(lease).trajectories[0], contexts=(), status=Status.FAILED)
                reply = await actor.answer(lease, trajectories=(failed, failed))
                assert reply.reason == "every trajectory failed or has no sampled token"
                await actor.until(lambda attempt=attempt: len(actor.leases) == attempt + 2)
            assert (actor.leases[-1].cursor, actor.leases[-1].attempt) == (1, 0)
            assert num_stored(setting, State.SKIPPED) == 1


async def test_the_slot_of_a_zero_variance_group_is_leased_again(tmp_path: Path) -> None:
    setting = Setting(tmp_path, skip_zero_variance=True)
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            leases = list(await actor.until_leased(4))
            same = make_group(leases[0], rewards=(1.0, 1.0))
            reply = await actor.submit(same, lease_id=leases[0].lease_id)
            assert (reply.outcome, reply.reason) == ("accepted", "zero variance")
            await actor.until(lambda: len(actor.leases) == 5)
            assert actor.leases[-1].cursor == 4
            assert (await actor.answer(leases[1])).outcome == "accepted"
            assert (await actor.answer(actor.leases[-1])).outcome == "accepted"
            assert [group.cursor for group in await next_batch(network)] == [4, 1]
            assert (await actor.submit(same, lease_id=leases[0].lease_id)).outcome == "duplicate"


async def test_a_straggler_is_overtaken_and_trained_later(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path, timeouts=LeaseTimeouts(60.0, straggler_timeout_s=0.3))) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            slow, *others = list(await actor.until_leased(4))
            for lease in others:
                assert (await actor.answer(lease)).outcome == "accepted"
            first = await next_batch(network)
            assert [group.cursor for group in first] == [2, 1]
            await commit_batch(network, first)
            assert (await actor.answer(slow)).outcome == "accepted"
            second = await next_batch(network)
            assert [group.cursor for group in second] == [0, 3]
            await commit_batch(network, second)
            gauges = await asyncio.to_thread(network.run, network.coordinator.gauges())
            assert gauges["queue/overtaken"] == 1
    audit = audit_run(tmp_path)
    assert (audit.problems, audit.num_overtaken, audit.num_tokens_masked) == ((), 1, 0)


async def test_malformed_messages_are_counted_and_dropped(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor, Actor(network.control_address, name="foe") as foe:
            await actor.until_leased(4)
            lease = encode(actor.leases[0])
            reply = encode(EngineReply(request_id=1, run_id=RUN, publication=0, version=0))
            deep = b"\x83\xa1v\x01\xa4kind\xa5drain\xa6reason" + b"\x91" * 1_000 + b"\xc0"
            for frames in ([b""], [b"\xff" * 100], [b"", b"x"], [b"x"] * 20, [lease], [reply], [deep], [lease[:-1]]):
                await foe.dealer.send(frames)
            await foe.until_status()
            assert (await actor.answer(actor.leases[0])).outcome == "accepted"
            gauges = await asyncio.to_thread(network.run, network.coordinator.gauges())
            assert gauges["queue/malformed"] == 8
            assert gauges["queue/actors"] == 2
