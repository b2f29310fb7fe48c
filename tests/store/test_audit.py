"""The audit finds every change to the store."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from learner.leases.decisions import Ended, EntryChanged, Granted, Trained
from learner.leases.entries import Entry, LeaseRecord, State
from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from tests.leases.groups import arrived
from tests.leases.test_admission import group

META = {"run_id": "r", "groups_per_batch": "1", "group_size": "2", "staleness_bound": "2"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One group leased, stored, and trained at step 4; its tokens are of version 3."""
    store = Store(RunFolder(tmp_path).store)
    store.claim(META)
    publications = [store.new_publication(version) for version in range(4)]
    sound = group()
    store.commit(
        [
            Granted(LeaseRecord(1, 0, 0, 0, "actor", 0.0), engine_version=3),
            arrived(sound, lease_id=1),
            EntryChanged(Entry(0, 0, 0, State.BUFFERED, 0)),
            Ended(1, "accepted"),
        ]
    )
    store.commit([Trained(0, (0,))])
    store.close()
    assert publications == [1, 2, 3, 4]
    return tmp_path


def tamper(run: Path, sql: str) -> tuple[str, ...]:
    with sqlite3.connect(RunFolder(run).store) as db:
        db.execute(sql)
    db.close()
    return audit_run(run).problems


def test_ages_are_recomputed_from_the_stored_tokens(run: Path) -> None:
    problems = audit_run(run).problems
    assert any("did not exist yet" in problem for problem in problems), "version 3 cannot be trained at step 0"


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("DELETE FROM entries", "1 questions were leased, but 0 are accounted for"),
        ("DELETE FROM groups", "acknowledged groups are not in the store"),
        ("UPDATE entries SET state = 'running'", "questions run without a lease"),
        ("UPDATE entries SET slot = 5", "trained in another batch"),
        ("UPDATE leases SET slot = 3", "another slot than they were leased for"),
        ("DELETE FROM publications", "name a publication that was never made"),
        ("UPDATE batches SET step = 1", "has a gap"),
        ("DELETE FROM batches", "trained but in no batch"),
    ],
)
def test_a_changed_store_has_problems(run: Path, sql: str, expected: str) -> None:
    assert any(expected in problem for problem in tamper(run, sql))
