"""The runner on a real socket; the test plays the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from protocol.errors import MalformedMessage
from protocol.framing import decode, encode
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, RunStatus, SubmitGroup, SubmitReply
from tests.actor.runner_stage import STATUS, WAIT_S, RunnerUnderTest, open_stage


@pytest.fixture
def resend_s() -> float:
    """The runner's `resend_s`; tests set another value with `parametrize`."""
    return 5.0


@pytest.fixture
async def stage(resend_s: float) -> AsyncIterator[RunnerUnderTest]:
    async with open_stage(resend_s=resend_s) as stage:
        yield stage


async def test_heartbeats_state_capacity_leases_and_counters_and_engines_are_passed_on(stage: RunnerUnderTest) -> None:
    first = await stage.receive(Heartbeat)
    assert isinstance(first, Heartbeat)
    assert (first.actor, first.capacity, first.held, first.counters) == ("actor-0", 3, [], {"busy": 1.0})
    await stage.lease(2)
    await stage.lease(1)
    await stage.receive(Heartbeat, held=[1, 2])
    engine = EngineFields(name="e", url="http://127.0.0.1:1", version=3, publication=4)
    await stage.send(RunStatus(run_id="run", step=0, num_steps=1, engines=[engine]))
    await stage.receive(Heartbeat)
    await stage.receive(Heartbeat)
    assert stage.engines == [[engine]]


@pytest.mark.parametrize("resend_s", [0.05])
async def test_a_group_is_sent_again_until_it_is_acknowledged(stage: RunnerUnderTest) -> None:
    await stage.receive(Heartbeat)
    await stage.lease(1)
    await stage.receive(Heartbeat, held=[1])
    stage.finish(1)
    first = await stage.receive(SubmitGroup)
    await stage.receive(Heartbeat, held=[1])
    for _ in range(2):
        await stage.send(STATUS)
        assert await stage.receive(SubmitGroup) == first
    await stage.send(SubmitReply(lease_id=7, outcome="accepted"))
    await stage.receive(Heartbeat, held=[1])
    await stage.send(SubmitReply(lease_id=1, outcome="accepted"))
    await stage.receive(Heartbeat, held=[])
    assert stage.runner.num_sent == 1


@pytest.mark.parametrize("resend_s", [0.0])
async def test_a_group_is_not_sent_again_before_a_run_status(stage: RunnerUnderTest) -> None:
    """A learner that is busy or stopped would otherwise receive many copies of each group later."""
    await stage.receive(Heartbeat)
    await stage.send(STATUS)
    await stage.lease(1)
    stage.finish(1)
    await stage.receive(SubmitGroup)
    for _ in range(5):
        _, frames = await stage.router.recv()
        assert isinstance(decode(frames)[0], Heartbeat)


@pytest.mark.parametrize("resend_s", [0.0])
async def test_when_the_learner_returns_all_groups_arrive_without_a_burst_of_heartbeats(stage: RunnerUnderTest) -> None:
    """The absence lasts 50 heartbeats: they are dropped, not queued, and no group is lost."""
    await stage.receive(Heartbeat)
    await stage.lease(1)
    await stage.lease(2)
    await stage.receive(Heartbeat, held=[1, 2])
    stage.finish(1)
    await stage.receive(SubmitGroup)
    address = stage.router.address
    stage.router.close()
    num_heartbeats = stage.num_heartbeats
    stage.finish(2)
    async with asyncio.timeout(WAIT_S):
        while stage.num_heartbeats < num_heartbeats + 50:  # noqa: ASYNC110 (no event for a dropped heartbeat)
            await asyncio.sleep(0.01)
    assert not stage.running.done()
    stage.router = stage.transport.router(address)
    stage.num_received = 0
    beat = await stage.receive(Heartbeat)
    assert isinstance(beat, Heartbeat)
    assert beat.held == [1, 2]
    delivered = set()
    while delivered < {1, 2}:
        await stage.send(STATUS)
        group = await stage.receive(SubmitGroup)
        assert isinstance(group, SubmitGroup)
        delivered.add(group.lease_id)
        await stage.send(SubmitReply(lease_id=group.lease_id, outcome="accepted"))
    assert stage.num_received < 25
    await stage.receive(Heartbeat, held=[])


async def test_a_refused_group_is_dropped(stage: RunnerUnderTest) -> None:
    await stage.receive(Heartbeat)
    await stage.lease(1)
    stage.finish(1)
    await stage.receive(SubmitGroup)
    await stage.send(SubmitReply(lease_id=1, outcome="refused", reason="no"))
    await stage.receive(Heartbeat, held=[])
    assert stage.runner.num_refused == 1


async def test_a_lease_that_arrives_twice_is_rolled_out_once(stage: RunnerUnderTest) -> None:
    await stage.receive(Heartbeat)
    await stage.lease(1)
    await stage.lease(1)
    await stage.receive(Heartbeat, held=[1])
    stage.finish(1)
    await stage.receive(SubmitGroup)
    await stage.lease(1)
    await stage.send(SubmitReply(lease_id=1, outcome="accepted"))
    await stage.receive(Heartbeat, held=[])
    assert stage.runner.num_sent == 1


async def test_drain_ends_the_runner_with_goodbye(stage: RunnerUnderTest) -> None:
    await stage.receive(Heartbeat)
    await stage.lease(1)
    await stage.receive(Heartbeat, held=[1])
    await stage.send(Drain(reason="the run is over"))
    goodbye = await stage.receive(Goodbye)
    assert isinstance(goodbye, Goodbye)
    assert goodbye.actor == "actor-0"
    async with asyncio.timeout(WAIT_S):
        assert await stage.running == "the run is over"


async def test_a_cancelled_runner_sends_goodbye(stage: RunnerUnderTest) -> None:
    await stage.receive(Heartbeat)
    await stage.lease(1)
    await stage.receive(Heartbeat, held=[1])
    stage.running.cancel()
    await stage.receive(Goodbye)
    await asyncio.wait([stage.running], timeout=WAIT_S)
    assert stage.running.cancelled()


async def test_unexpected_and_malformed_messages_are_ignored(stage: RunnerUnderTest) -> None:
    beat = await stage.receive(Heartbeat)
    for frames in ([b""], [b"\xff" * 9], [encode(beat)], [b"x"] * 20):
        assert stage.router.send(stage.peer, frames)
    await stage.lease(1)
    await stage.receive(Heartbeat, held=[1])


async def test_an_exception_in_a_rollout_ends_the_actor(stage: RunnerUnderTest) -> None:
    """The process ends with the error, its leases are freed, and the launcher restarts it: the error is not hidden."""
    stage.rollout_error = ZeroDivisionError()
    await stage.receive(Heartbeat)
    await stage.lease(1)
    await stage.receive(Goodbye)
    await asyncio.wait([stage.running], timeout=WAIT_S)
    error = stage.running.exception()
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error.exceptions[0], ZeroDivisionError)


async def test_a_group_that_the_coordinator_could_not_decode_ends_the_actor(stage: RunnerUnderTest) -> None:
    """The coordinator would drop it without a reply, and the actor would never get an acknowledgement."""
    stage.question_id = "q" * 200
    await stage.receive(Heartbeat)
    await stage.lease(1)
    stage.finish(1)
    await stage.receive(Goodbye)
    await asyncio.wait([stage.running], timeout=WAIT_S)
    error = stage.running.exception()
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error.exceptions[0], MalformedMessage)
    assert "question.id" in str(error.exceptions[0])
