"""What must not change when a run is resumed: the identity of the run (`protocol.run_identity`).

The store keeps it as section → JSON text. Stores of earlier versions have other keys, with plain text as values: they
can be read, but not resumed, because they do not state the model's content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.config import Config
from protocol.identity_differences import differences
from protocol.run_identity import learner_identity

_LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the audit and the retention rule need to know about a stored run."""

    run_id: str
    groups_per_batch: int
    staleness_bound: int
    last_context_only: bool


def resume_key(config: Config) -> dict[str, str]:
    """Section → JSON text. Raises: DataError (a file that cannot be read)."""
    return learner_identity(config)


def changes(stored: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """One clause for each key of the stored resume key that `mine` does not agree with; empty: it may be resumed."""
    if not stored:
        return []
    if missing := sorted(mine.keys() - stored.keys()):
        return [f"an earlier version of Palimpsest made it, which did not record {', '.join(missing)}"]
    return differences(stored, mine, what="this config")


def run_facts(stored: Mapping[str, str]) -> RunFacts:
    """Reads the facts from a stored resume key, also of an earlier version."""
    if _LEARNER not in stored:
        return RunFacts(
            run_id=stored["run_id"],
            groups_per_batch=int(stored["groups_per_batch"]),
            staleness_bound=int(stored["staleness_bound"]),
            last_context_only=stored.get("ablation") == "last-context",
        )
    learner = json.loads(stored[_LEARNER])
    return RunFacts(
        run_id=json.loads(stored["run"])["name"],
        groups_per_batch=learner["groups_per_batch"],
        staleness_bound=learner["staleness_bound"],
        last_context_only=learner["ablation"] == "last-context",
    )
