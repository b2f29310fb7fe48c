"""The runner's free slots and its drain, on a real socket; the test plays the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from actor.runner import DRAINED
from protocol.messages import Drain, Goodbye, SubmitGroup, SubmitReply
from tests.actor.runner_stage import STATUS, WAIT_S, RunnerUnderTest, open_stage


@pytest.fixture
async def stage() -> AsyncIterator[RunnerUnderTest]:
    """Heartbeats that are sent because of the clock come after the time-out of the test."""
    async with open_stage(heartbeat_s=2 * WAIT_S, drain_s=WAIT_S) as stage:
        yield stage


async def until_free(stage: RunnerUnderTest, num: int) -> None:
    while (await stage.heartbeat()).free_slots != num:
        pass


async def test_a_lease_claims_its_slots_at_once_and_each_trajectory_gives_one_back() -> None:
    async with open_stage() as stage:
        assert (await stage.heartbeat()).free_slots == 3
        await stage.lease(1, group_size=2)
        assert (await stage.heartbeat(held=[1])).free_slots == 1
        await stage.lease(2, group_size=4)
        assert (await stage.heartbeat(held=[1, 2])).free_slots == 0, "six trajectories for three slots"
        for _ in range(3):
            stage.trajectory_ends[2]()
        stage.trajectory_ends[1]()
        await until_free(stage, 1)
        stage.finish(1)
        await stage.receive(SubmitGroup)
        await until_free(stage, 2)
        stage.finish(2)
        await stage.receive(SubmitGroup)
        await until_free(stage, 3)
        assert (await stage.heartbeat()).held == [1, 2], "groups that are not acknowledged use no slot"


async def test_a_free_slot_is_reported_at_once_if_the_learner_knows_of_none(stage: RunnerUnderTest) -> None:
    await stage.heartbeat()
    await stage.lease(1, group_size=4)
    stage.finish(1)
    assert (await stage.heartbeat(held=[1])).free_slots == 3
    num_heartbeats = stage.num_heartbeats
    await stage.lease(2, group_size=2)
    stage.finish(2)
    await stage.receive(SubmitGroup)
    assert stage.num_heartbeats == num_heartbeats, "the learner knows that 1 of 3 slots is free"
    await stage.lease(3, group_size=1)
    stage.finish(3)
    assert (await stage.heartbeat(held=[1, 2, 3])).free_slots == 3


async def test_drain_finishes_the_groups_takes_no_lease_and_says_goodbye(stage: RunnerUnderTest) -> None:
    await stage.heartbeat()
    await stage.lease(1, group_size=4)
    await stage.lease(2)
    await stage.started(1, 2)
    stage.drain.set()
    beat = await stage.heartbeat()
    assert (beat.draining, beat.free_slots, beat.held) == (True, 0, [1, 2])
    await stage.lease(3)
    stage.finish(3)
    for lease_id in (1, 2):
        stage.finish(lease_id)
        group = await stage.receive(SubmitGroup)
        assert isinstance(group, SubmitGroup)
        assert group.lease_id == lease_id
        assert not stage.running.done()
        await stage.send(SubmitReply(lease_id=lease_id, outcome="accepted"))
    await stage.receive(Goodbye)
    async with asyncio.timeout(WAIT_S):
        assert await stage.running == DRAINED
    assert stage.runner.num_sent == 2


async def test_groups_are_sent_again_while_the_actor_drains() -> None:
    async with open_stage(resend_s=0.05, drain_s=WAIT_S) as stage:
        await stage.heartbeat()
        await stage.lease(1)
        stage.finish(1)
        await stage.receive(SubmitGroup)
        stage.drain.set()
        await stage.send(STATUS)
        await stage.receive(SubmitGroup)
        await stage.send(SubmitReply(lease_id=1, outcome="accepted"))
        await stage.receive(Goodbye)


async def test_drain_ends_after_drain_s_with_goodbye() -> None:
    async with open_stage(drain_s=0.1) as stage:
        await stage.heartbeat()
        await stage.lease(1)
        await stage.heartbeat(held=[1])
        stage.drain.set()
        await stage.receive(Goodbye)
        async with asyncio.timeout(WAIT_S):
            assert await stage.running == DRAINED


async def test_the_end_of_the_run_ends_a_drain(stage: RunnerUnderTest) -> None:
    await stage.heartbeat()
    await stage.lease(1)
    await stage.started(1)
    stage.drain.set()
    assert (await stage.heartbeat()).draining
    await stage.send(Drain(reason="the run is over"))
    async with asyncio.timeout(WAIT_S):
        assert await stage.running == "the run is over"
