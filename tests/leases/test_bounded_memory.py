"""What peers without keys can make the learner remember is bounded (B6)."""

from __future__ import annotations

import pytest

from learner.leases.actors import Actor, Actors
from learner.leases.admission import Rules
from learner.leases.engines import SILENT_AFTER_S, Engines
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.scheduler import Scheduler
from protocol.errors import MalformedMessage
from protocol.framing import decode, encode
from protocol.messages import EngineFields, Heartbeat
from protocol.weight_messages import MAX_ERROR_CHARS, EngineReport
from tests.leases.groups import GROUP_SIZE, RUN, VOCABULARY

NUM_NAMES = 10_000


def report(name: str) -> EngineReport:
    fields = EngineFields(name=name, url="http://127.0.0.1:1", version=0, publication=0)
    return EngineReport(request_id=1, engine=fields, state="serving", counters={})


def heartbeat(name: str, *, incarnation: str = "1", free_slots: int = 0) -> Heartbeat:
    return Heartbeat(actor=name, incarnation=incarnation, capacity=64, free_slots=free_slots, held=[])


def test_engines_that_report_are_never_forgotten_and_silent_ones_make_room() -> None:
    engines = Engines(max_engines=8)
    assert all(engines.report(report(f"engine-{i}"), now_s=0.0) for i in range(8))
    assert not any(engines.report(report(f"new-{i}"), now_s=1.0) for i in range(NUM_NAMES))
    assert engines.report(report("engine-0"), now_s=SILENT_AFTER_S)
    assert engines.report(report("new"), now_s=SILENT_AFTER_S)
    names = {each.engine.name for each in engines.reports()}
    assert len(names) == 8
    assert {"engine-0", "new"} <= names


def test_actors_that_report_keep_their_place_and_silent_ones_make_room() -> None:
    scheduler = Scheduler(
        LeaseTable(groups_per_batch=2, staleness_bound=1, num_steps=100),
        rules=Rules(RUN, GROUP_SIZE, VOCABULARY, skip_zero_variance=True),
        timeouts=LeaseTimeouts(60.0),
        publications={},
        num_failures={},
        started_s=0.0,
        max_actors=8,
    )
    for i in range(8):
        scheduler.on_heartbeat(b"%d" % i, heartbeat(f"actor-{i}"), now_s=0.0)
    for i in range(NUM_NAMES):
        assert scheduler.on_heartbeat(b"x", heartbeat(f"new-{i}"), now_s=1.0).sends == []
    scheduler.on_heartbeat(b"0", heartbeat("actor-0"), now_s=10.0)
    assert scheduler.on_heartbeat(b"x", heartbeat("new"), now_s=10.0).sends
    assert len(scheduler.actors) == 8
    assert {"actor-0", "new"} <= scheduler.actors.keys()


def test_the_queue_of_actors_does_not_grow_with_the_number_of_reports() -> None:
    actors = Actors()
    actors["most"] = Actor(b"", "1")
    actors.queue("most", free_slots=1_000)
    actors["a"] = Actor(b"", "1")
    for i in range(NUM_NAMES):
        actors.queue("a", free_slots=1 + i % 2)
    assert actors.num_queued < 100
    assert (actors.take(), actors.take(), actors.take()) == ("most", "a", None)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "engine_report", "error": "x" * (MAX_ERROR_CHARS + 1)},
        {"kind": "engine_report", "counters": {f"c{i}": 0.0 for i in range(65)}},
        {"kind": "heartbeat", "held": list(range(70_000))},
        {"kind": "heartbeat", "counters": {f"c{i}": 0.0 for i in range(65)}},
        {"kind": "heartbeat", "actor": "x" * 129},
    ],
)
def test_long_fields_are_refused(fields: dict[str, object]) -> None:
    good = {"heartbeat": heartbeat("a"), "engine_report": report("a")}[str(fields["kind"])]
    changed = good.model_copy(update={name: value for name, value in fields.items() if name != "kind"})
    decode([encode(good)])
    with pytest.raises(MalformedMessage):
        decode([encode(changed)])
