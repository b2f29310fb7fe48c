"""The store: all or nothing, a disk that is full, and which tokens may go."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from learner.leases.decisions import Ended, Granted, Moved, Placed, Trained
from learner.leases.lease_table import Entry, LeaseRecord, State
from learner.network import coordinator
from learner.network.network_thread import NetworkThread
from learner.store.audit import audit_run
from learner.store.retention import drop_tokens, expired_steps
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.errors import StoreError, StoreFullError
from protocol.messages import Lease
from tests.learner_plane.peers import RUN, WAIT_S, Actor, Setting, arrived, control_address, make_group, open_plane
from tests.learner_plane.test_coordinator import IDENTITY, serve_version

NUM_STEPS = 6


def lease_of(cursor: int) -> Lease:
    return Lease(lease_id=cursor + 1, run_id=RUN, cursor=cursor, attempt=0, group_size=2, min_version=0)


def put(store: Store, cursor: int, *, slot: int, version: int, outcome: str = "accepted") -> None:
    """A question leased, and its group."""
    group = make_group(lease_of(cursor), version=version, publication=version + 1)
    state = State.BUFFERED if outcome == "accepted" else State.SKIPPED
    kept = slot if outcome == "accepted" else -1
    store.commit(
        [
            Granted(LeaseRecord(cursor + 1, cursor, slot, 0, "actor", 0.0), version),
            arrived(group, lease_id=cursor + 1),
            Placed(Entry(cursor, kept, 0, state, slot)),
            Ended(cursor + 1, "accepted" if outcome == "accepted" else "skipped"),
        ]
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A run of six steps of two groups, of the version before each; question 2 was skipped."""
    store = Store(RunFolder(tmp_path).store)
    store.claim(IDENTITY)
    for version in range(NUM_STEPS):
        store.new_publication(version)
    put(store, 2, slot=2, version=0, outcome="skipped")
    cursors = [cursor for cursor in range(2 * NUM_STEPS + 1) if cursor != 2]
    for slot, cursor in enumerate(cursors):
        put(store, cursor, slot=slot, version=max(0, slot // 2 - 1))
    for step in range(NUM_STEPS):
        store.commit([Trained(step, tuple(cursors[2 * step : 2 * step + 2]))])
    yield store
    store.close()


def steps(store: Store, *, checkpoint_step: int, keep_steps: int | None = None, keep_bytes: int | None = None):
    return list(expired_steps(store, checkpoint_step=checkpoint_step, keep_steps=keep_steps, keep_bytes=keep_bytes))


def test_what_may_go(store: Store) -> None:
    assert steps(store, checkpoint_step=6) == []
    assert steps(store, checkpoint_step=6, keep_steps=2) == [0, 1, 2, 3]
    assert steps(store, checkpoint_step=6, keep_bytes=0) == [0, 1, 2, 3, 4, 5]
    assert steps(store, checkpoint_step=3, keep_bytes=0) == [0, 1, 2], "a resume would train steps 3 to 5 again"
    assert steps(store, checkpoint_step=0, keep_steps=0, keep_bytes=0) == []
    size = store.query("SELECT sum(num_bytes) FROM groups")[0][0]
    assert steps(store, checkpoint_step=6, keep_bytes=size) == []
    assert steps(store, checkpoint_step=6, keep_bytes=size - 1) == [0]
    assert steps(store, checkpoint_step=6, keep_steps=5, keep_bytes=size // 2) == [0, 1, 2, 3]


def test_dropped_tokens_leave_what_the_audit_needs(store: Store, tmp_path: Path) -> None:
    before = audit_run(tmp_path)
    for step in steps(store, checkpoint_step=6, keep_steps=3):
        drop_tokens(store, step)
    assert audit_run(tmp_path) == before
    assert (before.problems, before.staleness_max, before.num_tokens_trained) == ((), 1, 48)
    held = [row[0] for row in store.query("SELECT cursor FROM groups WHERE num_bytes > 0 ORDER BY cursor")]
    assert held == [7, 8, 9, 10, 11, 12], "what was skipped goes with the steps around it"
    assert steps(store, checkpoint_step=6, keep_steps=3) == []
    with pytest.raises(StoreError, match="has dropped the tokens of group 1"):
        store.group(1)


def test_an_old_token_that_was_dropped_is_still_found(store: Store, tmp_path: Path) -> None:
    for step in range(NUM_STEPS):
        drop_tokens(store, step)
    store._db.execute("UPDATE meta SET value = '0' WHERE key = 'staleness_bound'")
    assert audit_run(tmp_path).problems == ("40 trained tokens are older than the bound of 0",)


def test_over_age_tokens_are_masked_only_of_who_was_overtaken(store: Store, tmp_path: Path) -> None:
    put(store, 13, slot=12, version=0)
    put(store, 14, slot=13, version=5)
    store.commit([Trained(6, (13, 14))])
    assert any("older than the bound" in problem for problem in audit_run(tmp_path).problems)
    store.commit([Moved(1, 13, 2, 12)])
    audit = audit_run(tmp_path)
    assert audit.problems == ()
    assert (audit.num_tokens_masked, audit.num_overtaken, audit.staleness_max) == (4, 1, 1)


def fill_up(store: Store) -> None:
    """SQLite's own limit; it fails as a full disk does. Below the size of the file it means that size."""
    store._db.execute("PRAGMA max_page_count = 1")


def make_room(store: Store) -> None:
    store._db.execute("PRAGMA max_page_count = 1073741823")


def test_a_full_disk_writes_nothing_of_an_event(store: Store, tmp_path: Path) -> None:
    fill_up(store)
    cursor = 13
    with pytest.raises(StoreFullError, match=r"store.sqlite: database or disk is full"):  # noqa: PT012
        while True:
            put(store, cursor, slot=cursor - 1, version=5)
            cursor += 1
    assert store.query("SELECT count(*) FROM leases") == [(cursor,)]
    assert store.query("SELECT count(*) FROM entries") == [(cursor,)]
    assert store.query("SELECT count(*) FROM groups") == [(cursor,)]
    make_room(store)
    put(store, cursor, slot=cursor - 1, version=5)
    assert audit_run(tmp_path).problems == ()


async def test_a_full_disk_stops_admission_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over real sockets: the actor is heard, its group is not answered; it is taken as soon as there is room."""
    monkeypatch.setattr(coordinator, "_FULL_RETRY_S", 0.1)
    setting = Setting(tmp_path, groups_per_batch=64)
    with open_plane(setting) as plane:
        store = plane.coordinator._store
        await asyncio.to_thread(store.claim, {**IDENTITY, "groups_per_batch": "64"})
        await serve_version(plane, 0)
        async with Actor(control_address(plane), capacity=64) as actor:
            leases = list(await actor.until_leased(64))
            await on_plane(plane, lambda: fill_up(store))
            sent = 0
            while not actor_unanswered(actor, sent):
                await actor.dealer.send(encode_group(make_group(leases[sent]), lease_id=leases[sent].lease_id))
                sent += 1
                await actor.until_status()
            assert sent > 1
            acknowledged = {reply.lease_id for reply in actor.replies if reply.outcome == "accepted"}
            assert {lease.lease_id for lease in leases[: sent - 1]} == acknowledged
            assert "database or disk is full: no group is admitted until there is room" in caplog.text
            gauges = await asyncio.to_thread(plane.run, plane.coordinator.gauges())
            assert gauges["queue/store_full"] >= 1
            assert gauges["queue/buffered"] == sent - 1
            await on_plane(plane, lambda: make_room(store))
            last = leases[sent - 1]
            async with asyncio.timeout(WAIT_S):
                while actor_unanswered(actor, sent):  # the runner, too, sends again what is not acknowledged
                    await actor.dealer.send(encode_group(make_group(last), lease_id=last.lease_id))
                    await asyncio.sleep(0.1)
            for lease in leases[sent:]:
                assert (await actor.answer(lease)).outcome == "accepted"
            async with asyncio.timeout(WAIT_S):
                batch = await asyncio.to_thread(plane.run, plane.coordinator.next_batch())
            assert [group.cursor for group in batch] == list(range(64))
    assert audit_run(tmp_path).problems == ()


async def test_a_step_waits_for_room_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_FULL_RETRY_S", 0.1)
    with open_plane(Setting(tmp_path)) as plane:
        store = plane.coordinator._store
        await serve_version(plane, 0)
        async with Actor(control_address(plane)) as actor:
            for lease in list(await actor.until_leased(4)):
                await actor.answer(lease)
            commit, full = store.commit, [True, True]

            def fails_twice(records) -> None:
                if full and any(isinstance(record, Trained) for record in records):
                    full.pop()
                    raise StoreFullError("the disk is full")
                commit(records)

            monkeypatch.setattr(store, "commit", fails_twice)
            async with asyncio.timeout(WAIT_S):
                await asyncio.to_thread(plane.run, plane.coordinator.finish_batch([0, 1]))
            assert full == []
            assert (store.num_batches(), store.batch(0)) == (1, [0, 1])
            batch = await asyncio.to_thread(plane.run, plane.coordinator.next_batch())
            assert [group.cursor for group in batch] == [2, 3]


def actor_unanswered(actor: Actor, sent: int) -> bool:
    return len({reply.lease_id for reply in actor.replies}) < sent


async def on_plane(plane: NetworkThread, action) -> None:
    """Runs where the store is used."""

    async def act() -> None:
        action()

    await asyncio.to_thread(plane.run, act())


def test_commits_reach_the_database_file_beside_them(tmp_path: Path) -> None:
    """Without its log, the copied file holds what was committed: nobody but the wal_checkpointer has put it there."""
    path, copied = RunFolder(tmp_path).store, tmp_path / "copied.sqlite"
    with closing(Store(path)) as store, store.wal_checkpointing():
        store.claim(IDENTITY)
        put(store, 0, slot=0, version=0)
        deadline_s = time.monotonic() + WAIT_S
        while True:
            shutil.copyfile(path, copied)
            # A copy that was made while pages were written is refused, or lacks a table: so is it until all is there.
            with (
                closing(sqlite3.connect(f"file:{copied}?immutable=1", uri=True)) as db,
                suppress(sqlite3.DatabaseError),
            ):
                if db.execute("SELECT cursor FROM groups").fetchall() == [(0,)]:
                    break
            assert time.monotonic() < deadline_s
    assert not Path(f"{path}-wal").exists(), "the last to close it leaves no log"
