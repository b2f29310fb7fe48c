"""The store: transactions, a full disk, and which tokens may be dropped."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from learner.leases.decisions import Ended, EntryChanged, Granted, SlotChanged, Trained
from learner.leases.entries import Entry, LeaseRecord, State
from learner.store.audit import audit_run
from learner.store.retention import check_resumable, drop_tokens, expired_steps
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.errors import DataError, StoreError, StoreFullError
from protocol.messages import Lease
from tests.leases.groups import GROUP_SIZE, RUN, arrived, make_group
from tests.store.full_disk import fill_up, make_room
from tests.store.small_disk import limited_file_size, small_disk

RESUME_KEY = {"run_id": RUN, "groups_per_batch": "2", "group_size": str(GROUP_SIZE), "staleness_bound": "1"}
WAIT_S = 20.0
NUM_STEPS = 6


def lease_of(cursor: int) -> Lease:
    return Lease(lease_id=cursor + 1, run_id=RUN, cursor=cursor, attempt=0, group_size=2, min_version=0)


def put(store: Store, cursor: int, *, slot: int, version: int, outcome: str = "accepted") -> None:
    """Stores a lease of a question, and its group."""
    group = make_group(lease_of(cursor), version=version, publication=version + 1)
    state = State.BUFFERED if outcome == "accepted" else State.SKIPPED
    kept = slot if outcome == "accepted" else -1
    store.commit(
        [
            Granted(LeaseRecord(cursor + 1, cursor, slot, 0, "actor", 0.0), version),
            arrived(group, lease_id=cursor + 1),
            EntryChanged(Entry(cursor, kept, 0, state, slot)),
            Ended(cursor + 1, "accepted" if outcome == "accepted" else "skipped"),
        ]
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A run of six steps of two groups; each group is one version old; question 2 was skipped."""
    store = Store(RunFolder(tmp_path).store)
    store.claim(RESUME_KEY)
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


def test_expired_steps_follow_checkpoint_and_limits(store: Store) -> None:
    assert steps(store, checkpoint_step=6) == []
    assert steps(store, checkpoint_step=6, keep_steps=2) == [0, 1, 2, 3]
    assert steps(store, checkpoint_step=6, keep_bytes=0) == [0, 1, 2, 3, 4, 5]
    assert steps(store, checkpoint_step=3, keep_bytes=0) == [0, 1, 2], "a resume would train steps 3 to 5 again"
    assert steps(store, checkpoint_step=0, keep_steps=0, keep_bytes=0) == []
    size = store.query("SELECT sum(num_bytes) FROM groups")[0][0]
    assert steps(store, checkpoint_step=6, keep_bytes=size) == []
    assert steps(store, checkpoint_step=6, keep_bytes=size - 1) == [0]
    assert steps(store, checkpoint_step=6, keep_steps=5, keep_bytes=size // 2) == [0, 1, 2, 3]


def test_the_audit_of_dropped_tokens_is_the_same(store: Store, tmp_path: Path) -> None:
    before = audit_run(tmp_path)
    for step in steps(store, checkpoint_step=6, keep_steps=3):
        drop_tokens(store, step)
    assert audit_run(tmp_path) == before
    assert (before.problems, before.staleness_max, before.num_tokens_trained) == ((), 1, 48)
    held = [row[0] for row in store.query("SELECT cursor FROM groups WHERE num_bytes > 0 ORDER BY cursor")]
    assert held == [7, 8, 9, 10, 11, 12], "skipped groups are dropped with the steps around them"
    assert steps(store, checkpoint_step=6, keep_steps=3) == []
    with pytest.raises(StoreError, match="has dropped the tokens of group 1"):
        store.group(1)


def test_over_age_tokens_are_found_after_they_were_dropped(store: Store, tmp_path: Path) -> None:
    for step in range(NUM_STEPS):
        drop_tokens(store, step)
    with closing(sqlite3.connect(RunFolder(tmp_path).store)) as db, db:
        db.execute("UPDATE meta SET value = '0' WHERE key = 'staleness_bound'")
    assert audit_run(tmp_path).problems == ("40 trained tokens are older than the bound of 0",)


def test_only_over_age_tokens_of_overtaken_groups_count_as_masked(store: Store, tmp_path: Path) -> None:
    put(store, 13, slot=12, version=0)
    put(store, 14, slot=13, version=5)
    store.commit([Trained(6, (13, 14))])
    assert any("older than the bound" in problem for problem in audit_run(tmp_path).problems)
    store.commit([SlotChanged(1, 13, 2, 12)])
    audit = audit_run(tmp_path)
    assert audit.problems == ()
    assert (audit.num_tokens_masked, audit.num_overtaken, audit.staleness_max) == (4, 1, 1)


def test_an_event_is_not_stored_in_part_when_the_disk_is_full(store: Store, tmp_path: Path) -> None:
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


def test_the_checkpointer_copies_commits_into_the_database_file(tmp_path: Path) -> None:
    """A copy of the database file without its write-ahead log has the commits: the checkpointer put them there."""
    path, copied = RunFolder(tmp_path).store, tmp_path / "copied.sqlite"
    with closing(Store(path)) as store, store.wal_checkpointing():
        store.claim(RESUME_KEY)
        put(store, 0, slot=0, version=0)
        deadline_s = time.monotonic() + WAIT_S
        while True:
            shutil.copyfile(path, copied)
            # A copy made while pages are written cannot be read or lacks a table: copy again until it is complete.
            with (
                closing(sqlite3.connect(f"file:{copied}?immutable=1", uri=True)) as db,
                suppress(sqlite3.DatabaseError),
            ):
                if db.execute("SELECT cursor FROM groups").fetchall() == [(0,)]:
                    break
            assert time.monotonic() < deadline_s
    assert not Path(f"{path}-wal").exists(), "the last connection that is closed removes the log"


def test_the_store_belongs_to_one_run(tmp_path: Path) -> None:
    store = Store(RunFolder(tmp_path).store)
    store.claim({"run_id": "a", "staleness_bound": "1"})
    store.claim({"run_id": "a", "staleness_bound": "1"})
    with pytest.raises(DataError, match="another run: staleness_bound: the run has 1, this config has 2; to resume"):
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


def test_a_lease_granted_in_the_future_counts_as_granted_now(store: Store) -> None:
    """The clock was set back by an hour between two lives of the learner."""
    now_s = 1_000_000.0
    granted = {13: now_s + 3600.0, 14: now_s - 5.0}
    for cursor, granted_s in granted.items():
        lease = LeaseRecord(cursor + 1, cursor, cursor, 0, "actor", granted_s)
        store.commit([Granted(lease, 0), EntryChanged(Entry(cursor, cursor, 0, State.RUNNING, cursor))])
    table = store.restore_lease_table(groups_per_batch=2, staleness_bound=1, num_steps=9, now_s=now_s)
    assert {lease.cursor: lease.granted_s for lease in table.leases.values()} == {13: now_s, 14: now_s - 5.0}


def test_a_run_resumes_only_where_no_token_was_dropped(store: Store) -> None:
    for step in (0, 1, 2):
        drop_tokens(store, step)
    check_resumable(store, step=3)
    check_resumable(store, step=NUM_STEPS)
    with pytest.raises(DataError, match="resumed from step 1 only, but the tokens of the steps 1 to 2 were dropped"):
        check_resumable(store, step=1)


def write_until_full(store: Store) -> None:
    while True:
        store.new_publication(7)


@pytest.mark.parametrize("num_bytes", [0, 4096, 100_000])
def test_a_quota_or_a_file_size_limit_is_a_full_disk(store: Store, num_bytes: int) -> None:
    """SQLite reports them as I/O errors. After the write that failed, the store can be read and written."""
    before = store.publications()
    with limited_file_size(num_bytes), pytest.raises(StoreFullError):
        write_until_full(store)
    made = store.publications()
    assert made.items() >= before.items()
    assert store.new_publication(8) == max(made) + 1


def test_a_store_cannot_be_created_on_a_full_disk_and_can_be_later(tmp_path: Path) -> None:
    with limited_file_size(0), pytest.raises(StoreFullError):
        Store(tmp_path / "store.sqlite")
    store = Store(tmp_path / "store.sqlite")
    store.claim(RESUME_KEY)
    store.close()


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_run_on_a_read_only_disk_is_audited(store: Store, tmp_path: Path, is_closed: bool) -> None:
    """Also if the learner was killed, so that the newest commits are only in the write-ahead log."""
    wanted = audit_run(tmp_path)
    if is_closed:
        store.close()
    else:
        assert (tmp_path / "store.sqlite-wal").stat().st_size > 0
    with small_disk(tmp_path / "disk", num_bytes=4 << 20) as disk:
        for file in ("store.sqlite", *(() if is_closed else ("store.sqlite-wal",))):
            shutil.copy(tmp_path / file, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert audit_run(disk) == wanted
