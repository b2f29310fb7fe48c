"""The coordinator over real sockets and a real store: leases, groups, refusals, silence and restarts."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.leases import scheduler
from learner.leases.admission import Rules
from learner.leases.decisions import Trained
from learner.leases.lease_table import LeaseTable, State
from learner.network.network_thread import NetworkThread
from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.config import NetworkConfig
from protocol.errors import DataError, PalimpsestError, SecurityError, StoreError, UnreachableError
from protocol.framing import encode
from protocol.messages import EngineReply, Lease
from protocol.types import Status, TrajectoryGroup
from tests.learner_plane.peers import (
    GROUP_SIZE,
    RUN,
    WAIT_S,
    Actor,
    Setting,
    control_address,
    make_group,
    open_plane,
    report_engine,
)

IDENTITY = {"run_id": RUN, "groups_per_batch": "2", "group_size": str(GROUP_SIZE), "staleness_bound": "1"}


async def serve_version(plane: NetworkThread, version: int) -> None:
    """The learner publishes `version`, and the only engine commits it."""
    publication = await asyncio.to_thread(lambda: plane.publish(_tiny_safetensors(), version=version))
    await report_engine(plane, version=version, publication=publication)


def _tiny_safetensors() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


def count(setting: Setting, state: State) -> int:
    store = Store(RunFolder(setting.folder).store, read_only=True)
    try:
        return store.query("SELECT count(*) FROM entries WHERE state = ?", state.value)[0][0]
    finally:
        store.close()


async def next_batch(plane: NetworkThread) -> list[TrajectoryGroup]:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(plane.run, plane.coordinator.next_batch())


async def finish(plane: NetworkThread, batch: list[TrajectoryGroup]) -> None:
    await asyncio.to_thread(plane.run, plane.coordinator.finish_batch([group.cursor for group in batch]))


async def test_no_lease_before_an_engine_serves(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        async with Actor(control_address(plane)) as actor:
            status = await actor.until_status()
            assert (status.run_id, status.step, status.num_steps, status.engines) == (RUN, 0, 3, [])
            await report_engine(plane, version=-1, publication=-1, state="joining")
            await actor.until_status()
            assert actor.leases == []
            await serve_version(plane, 0)
            leases = await actor.until_leased(4)
            assert [(lease.cursor, lease.attempt, lease.group_size) for lease in leases] == [
                (cursor, 0, GROUP_SIZE) for cursor in range(4)
            ]
            assert [engine.version for engine in (await actor.until_status()).engines] == [0]


async def test_leases_follow_credits(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        address = control_address(plane)
        async with Actor(address, capacity=1) as small, Actor(address, name="actor-1", capacity=2) as large:
            await small.until_leased(1)
            await large.until_leased(2)
            await small.until_status()
            assert (len(small.leases), len(large.leases)) == (1, 2)
            assert (await small.answer(small.leases[0])).outcome == "accepted"
            await small.until(lambda: len(small.leases) == 2)
            assert len({lease.lease_id for lease in small.leases + large.leases}) == 4


async def test_a_run_to_its_end(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_plane(setting) as plane:
        await asyncio.to_thread(plane.coordinator._store.claim, IDENTITY)
        async with Actor(control_address(plane)) as actor:
            for step in range(3):
                await serve_version(plane, step)
                await actor.until_leased(min(4 + 2 * step, 6))
                for lease in actor.leases[2 * step : 2 * step + 2][::-1]:
                    group = make_group(lease, version=step, publication=step + 1)
                    assert (await actor.submit(group, lease_id=lease.lease_id)).outcome == "accepted"
                    actor.held.discard(lease.lease_id)
                batch = await next_batch(plane)
                assert [group.cursor for group in batch] == [2 * step, 2 * step + 1]
                await finish(plane, batch)
            await asyncio.to_thread(plane.run, plane.coordinator.drain("done"))
            await actor.until(lambda: bool(actor.drains))
            assert actor.drains[0].reason == "done"
    audit = audit_run(tmp_path)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_trained, audit.num_running, audit.num_groups_lost) == (3, 6, 0, 0)
    assert audit.staleness_max == 0


async def test_a_group_that_is_sent_again_is_a_duplicate(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_plane(setting) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            first, *_ = await actor.until_leased(4)
            assert (await actor.answer(first)).outcome == "accepted"
            for _ in range(3):
                assert (await actor.answer(first)).outcome == "duplicate"
            assert count(setting, State.BUFFERED) == 1
            stored = await asyncio.to_thread(plane.coordinator._store.group, first.cursor)
            assert stored.question == make_group(first).question
            assert len(actor.leases) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": 1}, "a group has 2 trajectories, got 1"),
        ({"token": 50}, "token ids must be below the vocabulary's 50, got 50"),
        ({"publication": 9}, "publication 9 of version 0 is not known"),
        ({"version": 1}, "publication 1 of version 1 is not known"),
    ],
)
async def test_refused_groups_are_issued_again(tmp_path: Path, change: dict[str, int], says: str) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
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
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            first, *_ = await actor.until_leased(4)
            frames = encode_group(make_group(first), lease_id=first.lease_id)
            frames[3] = np.full(4, np.nan, dtype=np.float32).tobytes()
            await actor.dealer.send(frames)
            await actor.until(lambda: len(actor.leases) == 5)
            assert actor.replies[0].outcome == "refused"
            assert "behavior_logprobs must be finite" in actor.replies[0].reason


async def test_groups_that_were_never_leased_cost_nothing(tmp_path: Path) -> None:
    """Another run's, an unknown question's, another question's lease, a lease to come: refused, and nothing moves."""
    setting = Setting(tmp_path)
    with open_plane(setting) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
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
            assert count(setting, State.BUFFERED) == 4


async def test_failed_groups_are_tried_so_often_and_then_skipped(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_plane(setting) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane), capacity=1) as actor:
            await actor.until_leased(1)
            for attempt in range(scheduler.MAX_FAILURES):
                lease = actor.leases[-1]
                assert (lease.cursor, lease.attempt) == (0, attempt)
                failed = replace(make_group(lease).trajectories[0], contexts=(), status=Status.FAILED)
                reply = await actor.answer(lease, trajectories=(failed, failed))
                assert reply.reason == "no trajectory survived the environment"
                await actor.until(lambda attempt=attempt: len(actor.leases) == attempt + 2)
            assert (actor.leases[-1].cursor, actor.leases[-1].attempt) == (1, 0)
            assert count(setting, State.SKIPPED) == 1


async def test_groups_without_variance_give_their_slot_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path, skip_zero_variance=True)
    with open_plane(setting) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            leases = list(await actor.until_leased(4))
            same = make_group(leases[0], rewards=(1.0, 1.0))
            reply = await actor.submit(same, lease_id=leases[0].lease_id)
            assert (reply.outcome, reply.reason) == ("accepted", "zero variance")
            await actor.until(lambda: len(actor.leases) == 5)
            assert actor.leases[-1].cursor == 4
            assert (await actor.answer(leases[1])).outcome == "accepted"
            assert (await actor.answer(actor.leases[-1])).outcome == "accepted"
            assert [group.cursor for group in await next_batch(plane)] == [4, 1]
            assert (await actor.submit(same, lease_id=leases[0].lease_id)).outcome == "duplicate"


async def test_a_straggler_is_overtaken_and_trained_later(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path, straggler_timeout_s=0.3)) as plane:
        await asyncio.to_thread(plane.coordinator._store.claim, IDENTITY)
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            slow, *others = list(await actor.until_leased(4))
            for lease in others:
                assert (await actor.answer(lease)).outcome == "accepted"
            first = await next_batch(plane)
            assert [group.cursor for group in first] == [2, 1]
            await finish(plane, first)
            assert (await actor.answer(slow)).outcome == "accepted"
            second = await next_batch(plane)
            assert [group.cursor for group in second] == [0, 3]
            await finish(plane, second)
            gauges = await asyncio.to_thread(plane.run, plane.coordinator.gauges())
            assert gauges["queue/overtaken"] == 1
    audit = audit_run(tmp_path)
    assert (audit.problems, audit.num_overtaken, audit.num_tokens_masked) == ((), 1, 0)


async def test_a_silent_actor_loses_its_leases(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path, lease_timeout_s=0.5)) as plane:
        await serve_version(plane, 0)
        address = control_address(plane)
        async with Actor(address) as silent, Actor(address, name="actor-1") as other:
            lost = list(await silent.until_leased(4))
            async with asyncio.timeout(WAIT_S):
                while len(other.leases) < 4:
                    await report_engine(plane, version=0)
                    await other.until_status()
            assert [lease.cursor for lease in other.leases] == [lease.cursor for lease in lost]
            assert {lease.attempt for lease in other.leases} == {1}
            # The first durable attempt wins, also a late one.
            assert (await silent.answer(lost[0])).outcome == "accepted"
            assert (await other.answer(other.leases[0])).outcome == "duplicate"


async def test_a_new_incarnation_frees_the_leases_of_the_old(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        address = control_address(plane)
        async with Actor(address, incarnation="1") as old, Actor(address, incarnation="2") as new:
            await old.until_leased(4)
            leases = await new.until_leased(4)
            assert [(lease.cursor, lease.attempt) for lease in leases] == [(cursor, 1) for cursor in range(4)]
            await old.goodbye()
            await old.until(lambda: True)
            assert (await new.answer(leases[0])).outcome == "accepted"
            await new.until_status()
            assert len(new.leases) == 4, "the goodbye of the old incarnation must not free what the new one holds"


async def test_goodbye_frees_leases(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        address = control_address(plane)
        async with Actor(address) as leaving, Actor(address, name="actor-1") as staying:
            await leaving.until_leased(4)
            await staying.until_status()
            assert staying.leases == []
            await leaving.goodbye()
            await staying.until(lambda: len(staying.leases) == 4)


async def test_a_lost_lease_is_issued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "LOST_AFTER_S", 0.0)
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            await actor.until_leased(4)
            actor.held = {lease.lease_id for lease in actor.leases[1:]}
            await actor.until_leased(5)
            assert (actor.leases[-1].cursor, actor.leases[-1].attempt) == (0, 1)


async def test_malformed_bytes_cost_nothing(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor, Actor(control_address(plane), name="foe") as foe:
            await actor.until_leased(4)
            lease = encode(actor.leases[0])
            reply = encode(EngineReply(request_id=1, run_id=RUN, publication=0, version=0))
            deep = b"\x83\xa1v\x01\xa4kind\xa5drain\xa6reason" + b"\x91" * 1_000 + b"\xc0"
            for frames in ([b""], [b"\xff" * 100], [b"", b"x"], [b"x"] * 20, [lease], [reply], [deep], [lease[:-1]]):
                await foe.dealer.send(frames)
            await foe.until_status()
            assert (await actor.answer(actor.leases[0])).outcome == "accepted"
            gauges = await asyncio.to_thread(plane.run, plane.coordinator.gauges())
            assert gauges["queue/malformed"] == 8
            assert gauges["queue/actors"] == 2


async def test_a_restarted_learner_goes_on(tmp_path: Path) -> None:
    """On the same store: buffered groups stay, running leases stay with their actors, lease ids are not used again."""
    setting = Setting(tmp_path)
    with open_plane(setting) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            leases: list[Lease] = list(await actor.until_leased(4))
            assert (await actor.answer(leases[0])).outcome == "accepted"
            assert (await actor.answer(leases[3])).outcome == "accepted"
    with open_plane(setting) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane), capacity=8) as actor:
            actor.held = {leases[1].lease_id, leases[2].lease_id}
            await actor.until_status()
            assert actor.leases == []
            assert (await actor.answer(leases[0])).outcome == "duplicate"
            assert (await actor.answer(leases[1])).outcome == "accepted"
            batch = await next_batch(plane)
            assert [group.cursor for group in batch] == [0, 1]
            assert batch[0].trajectories[0].contexts[0].token_ids.tolist() == [1, 2, 3, 4]
            await finish(plane, batch)
    with open_plane(setting) as plane:
        again = await asyncio.to_thread(plane.run, plane.coordinator.recorded_batch(0))
        assert [group.cursor for group in again] == [0, 1]
        await serve_version(plane, 1)
        async with Actor(control_address(plane)) as actor:
            actor.held = {leases[2].lease_id}
            fresh = await actor.until_leased(2)
            assert [lease.cursor for lease in fresh] == [4, 5]
            assert min(lease.lease_id for lease in fresh) > max(lease.lease_id for lease in leases)


async def test_leases_of_an_actor_that_never_returns_expire(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            await actor.until_leased(4)
    with open_plane(Setting(tmp_path, lease_timeout_s=0.3)) as plane:
        async with Actor(control_address(plane), name="actor-1") as actor:
            async with asyncio.timeout(WAIT_S):
                while len(actor.leases) < 4:
                    await report_engine(plane, version=0)
                    await actor.until_status()
            assert {lease.attempt for lease in actor.leases} == {1}


def test_the_store_belongs_to_one_run(tmp_path: Path) -> None:
    store = Store(RunFolder(tmp_path).store)
    store.claim({"run_id": "a", "staleness_bound": "1"})
    store.claim({"run_id": "a", "staleness_bound": "1"})
    with pytest.raises(DataError, match="belongs to a run with staleness_bound = 1, not 2"):
        store.claim({"run_id": "a", "staleness_bound": "2"})
    with pytest.raises(StoreError, match="holds no group 3"):
        store.group(3)
    store.close()
    (tmp_path / "x.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match="cannot be opened"):
        Store(tmp_path / "x.sqlite")


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    store = Store(RunFolder(tmp_path).store)
    store.commit([Trained(0, (0, 1))])
    with pytest.raises(StoreError, match="UNIQUE"):
        store.commit([Trained(1, (2, 1))])
    assert store.batch(1) == []
    assert store.num_batches() == 1
    store.close()


def test_a_plane_that_cannot_listen_says_so(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        port = int(control_address(plane).rpartition(":")[2])
        coordinator_, store = plane.coordinator, plane.coordinator._store
        for network, error, says in (
            (NetworkConfig(control_port=port), UnreachableError, f"cannot listen on tcp://127.0.0.1:{port}: .* in use"),
            (NetworkConfig(host="0.0.0.0"), SecurityError, "beyond loopback and needs CURVE keys"),
        ):
            second = NetworkThread(
                network=network,
                store=store,
                lease_table=coordinator_._scheduler.lease_table,
                rules=coordinator_._scheduler._rules,
                lease_timeout_s=1.0,
                on_death=lambda: None,
            )
            with pytest.raises(error, match=says), second:
                pass


async def test_the_older_of_two_actors_of_one_name_is_told_to_leave(tmp_path: Path) -> None:
    with open_plane(Setting(tmp_path)) as plane:
        await serve_version(plane, 0)
        address = control_address(plane)
        async with Actor(address, incarnation="1") as old, Actor(address, incarnation="2") as new:
            await old.until_leased(4)
            await new.until_leased(4)
            await old.heartbeat()
            await old.until(lambda: bool(old.drains))
            assert "another actor has joined under the name" in old.drains[-1].reason
            await new.until_status()
            assert len(new.leases) == 4, "the older one frees nothing any more"


async def test_a_plane_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = threading.Event()
    with (  # noqa: PT012
        pytest.raises(PalimpsestError, match="disk I/O error"),
        open_plane(Setting(tmp_path), on_death=died.set) as plane,
    ):
        await serve_version(plane, 0)
        monkeypatch.setattr(Store, "commit", _broken)
        async with Actor(control_address(plane)) as actor:
            await actor.heartbeat()
            assert await asyncio.to_thread(died.wait, WAIT_S)


def _broken(*_: object, **__: object) -> None:
    raise StoreError("disk I/O error")


def test_a_plane_that_cannot_start_has_let_go_of_the_store(tmp_path: Path) -> None:
    """Its thread would go on with a database that the caller closes: that ends the process with SIGSEGV."""
    with socket.create_server(("127.0.0.1", 0)) as taken, closing(Store(RunFolder(tmp_path).store)) as store:
        plane = NetworkThread(
            network=NetworkConfig(control_port=taken.getsockname()[1]),
            store=store,
            lease_table=LeaseTable(groups_per_batch=1, staleness_bound=0, num_steps=1),
            rules=Rules("run", 1, 1, False),
            lease_timeout_s=1.0,
            on_death=lambda: None,
        )
        with pytest.raises(UnreachableError, match="cannot listen"):
            plane.__enter__()
        assert not plane._thread.is_alive()
