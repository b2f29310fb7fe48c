"""Simulates a full disk with SQLite's limit on the file size, which causes the same error."""

from __future__ import annotations

from learner.store.store import Store


def fill_up(store: Store) -> None:
    """Prevents the file from growing: SQLite replaces a limit below the present size by the present size."""
    store.query("PRAGMA max_page_count = 1")


def make_room(store: Store) -> None:
    store.query("PRAGMA max_page_count = 1073741823")
