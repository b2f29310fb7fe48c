"""What a learner that waits for a batch says, from the state of the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from learner.leases.wait_cause import RunState, wait_cause
from protocol.messages import EngineFields
from protocol.weight_messages import EngineReport


def engine(name: str, version: int, state: str = "serving", error: str = "") -> EngineReport:
    fields = EngineFields(name=name, url="http://127.0.0.1:1", version=version, publication=version)
    return EngineReport.model_validate({"request_id": 0, "engine": fields, "state": state, "error": error})


GOOD = RunState(
    step=12,
    groups_per_batch=16,
    staleness_bound=2,
    num_ready=9,
    oldest_lease=("actor-1", 41.2),
    num_actors=2,
    engines=(engine("engine-0", 12),),
    serving=frozenset({"engine-0"}),
)
FAILING = replace(GOOD, num_failed_in_a_row=64, recent_failures={"retriever timeout after 30 s": 398, "x": 14})
SKIPPING = replace(GOOD, num_skipped_in_a_row=50, skipped_reward=0.0)


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        (GOOD, "leases", "oldest lease 41 s at actor-1"),
        (replace(GOOD, oldest_lease=("actor-1", -3.0)), "leases", "oldest lease 0 s at actor-1"),
        (replace(GOOD, oldest_lease=("a\x1b[2J\nb", 1.0)), "leases", "oldest lease 1 s at a?[2J b"),
        (replace(GOOD, oldest_lease=None), "leases", "no actor has a free slot"),
        (replace(GOOD, num_actors=0), "actors", "no actor is connected"),
        (
            replace(GOOD, num_actors=0, num_refused_actors=2),
            "actors",
            "no actor is connected; 2 were refused, see the log",
        ),
        (replace(GOOD, engines=(), serving=frozenset()), "engines", "no engine is connected"),
        (
            replace(GOOD, engines=(engine("engine-0", 3, "quarantined", "canary off by 0.3"),), serving=frozenset()),
            "engines",
            "no engine serves: engine-0 is quarantined (canary off by 0.3)",
        ),
        (
            replace(GOOD, engines=(engine("e0", -1, "joining"), engine("e1", 12)), serving=frozenset()),
            "engines",
            "no engine serves: e0 is joining; e1 does not report",
        ),
        (
            replace(GOOD, engines=tuple(engine(f"e{i}", -1, "joining") for i in range(6)), serving=frozenset()),
            "engines",
            "no engine serves: e0 is joining; e1 is joining; e2 is joining; e3 is joining; and 2 more",
        ),
        (
            replace(GOOD, engines=(engine("e0", 9),), serving=frozenset({"e0"})),
            "engines",
            "no engine has version 10 or a newer one: e0 has version 9",
        ),
        (FAILING, "failures", "the last 64 groups failed, most frequent reason: retriever timeout after 30 s"),
        (
            replace(FAILING, recent_failures={}),
            "failures",
            "the last 64 groups failed, most frequent reason: the actors have not reported it",
        ),
        (replace(FAILING, num_failed_in_a_row=3), "leases", "oldest lease 41 s at actor-1"),
        (
            SKIPPING,
            "signal",
            "no signal: every reward is 0 in the last 50 groups, which were skipped (zero variance)",
        ),
        (replace(SKIPPING, num_skipped_in_a_row=31), "leases", "oldest lease 41 s at actor-1"),
        (replace(FAILING, is_disk_full=True, num_actors=0, engines=()), "disk", "waiting for room on the disk"),
        (replace(FAILING, num_actors=0), "actors", "no actor is connected"),
        (replace(FAILING, num_actors=0, engines=()), "engines", "no engine is connected"),
    ],
)
def test_the_cause_of_a_wait(state: RunState, kind: str, text: str) -> None:
    cause = wait_cause(state)
    assert (cause.kind, cause.text) == (kind, text)
