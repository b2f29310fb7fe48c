"""A full disk by SQLite's own limit of a file's size: SQLite fails in the same way."""

from __future__ import annotations

from learner.store.store import Store


def fill_up(store: Store) -> None:
    """The file cannot grow: a limit below its size means its present size."""
    store.query("PRAGMA max_page_count = 1")


def make_room(store: Store) -> None:
    store.query("PRAGMA max_page_count = 1073741823")
