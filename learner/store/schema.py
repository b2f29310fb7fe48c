"""The tables of the store. `record_rows` writes them, `Store` reads them.

meta          the resume key                                    one row per entry of the key
leases        one attempt at a question by one actor            granted, ended
entries       a question: its slot and its state                changed in place
moves         a question changed its slot
groups        a stored group; retention empties its columns     num_bytes 0: its tokens were dropped
batches       the questions that each step was trained on
publications  the versions that were offered to the engines
"""

from __future__ import annotations

SCHEMA_VERSION = 3

OPEN = "state IN ('running', 'waiting', 'buffered')"
"""The condition for entries that are neither trained nor skipped; that of the index `entries_open`."""

SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (
  lease_id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, slot INTEGER NOT NULL, attempt INTEGER NOT NULL,
  actor TEXT NOT NULL, engine_version INTEGER NOT NULL, granted_at REAL NOT NULL,
  outcome TEXT NOT NULL DEFAULT 'running', reason TEXT NOT NULL DEFAULT '');
CREATE INDEX leases_running ON leases(outcome) WHERE outcome = 'running';
CREATE INDEX leases_cursor ON leases(cursor);
CREATE TABLE entries (
  cursor INTEGER PRIMARY KEY, slot INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL,
  first_slot INTEGER NOT NULL);
CREATE INDEX entries_open ON entries(cursor) WHERE {OPEN};
CREATE TABLE moves (
  move_id INTEGER PRIMARY KEY, step INTEGER NOT NULL, cursor INTEGER NOT NULL, from_slot INTEGER NOT NULL,
  to_slot INTEGER NOT NULL);
CREATE TABLE groups (
  cursor INTEGER PRIMARY KEY, lease_id INTEGER NOT NULL, attempt INTEGER NOT NULL, stored_at REAL NOT NULL,
  num_trajectories INTEGER NOT NULL, num_contexts INTEGER NOT NULL, num_trained_tokens INTEGER NOT NULL,
  oldest_version INTEGER, reward_mean REAL NOT NULL, num_bytes INTEGER NOT NULL, tally TEXT NOT NULL,
  header BLOB NOT NULL, token_ids BLOB NOT NULL, spans BLOB NOT NULL, logprobs BLOB NOT NULL);
CREATE INDEX groups_held ON groups(num_bytes) WHERE num_bytes > 0;
CREATE TABLE batches (step INTEGER NOT NULL, position INTEGER NOT NULL, cursor INTEGER NOT NULL UNIQUE,
  PRIMARY KEY (step, position)) WITHOUT ROWID;
CREATE TABLE publications (
  publication INTEGER PRIMARY KEY AUTOINCREMENT, version INTEGER NOT NULL, published_at REAL NOT NULL);
"""
