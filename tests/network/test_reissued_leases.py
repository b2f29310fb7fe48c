"""Leases of silent, restarted and leaving actors, and of a restarted learner, over real sockets and a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path

from learner.leases.lease_timeouts import LeaseTimeouts
from protocol.messages import Lease
from tests.network.peers import (
    WAIT_S,
    Actor,
    Setting,
    commit_batch,
    next_batch,
    open_network,
    report_engine,
    serve_version,
)


async def test_a_silent_actor_loses_its_leases(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path, timeouts=LeaseTimeouts(lease_timeout_s=0.5))) as network:
        await serve_version(network, 0)
        address = network.control_address
        async with Actor(address) as silent, Actor(address, name="actor-1") as other:
            lost = list(await silent.until_leased(4))
            async with asyncio.timeout(WAIT_S):
                while len(other.leases) < 4:
                    await report_engine(network, version=0)
                    await other.until_status()
            assert [lease.cursor for lease in other.leases] == [lease.cursor for lease in lost]
            assert {lease.attempt for lease in other.leases} == {1}
            # The first durable attempt wins, even if its lease has expired.
            assert (await silent.answer(lost[0])).outcome == "accepted"
            assert (await other.answer(other.leases[0])).outcome == "duplicate"


async def test_a_restarted_actor_frees_the_leases_of_its_old_incarnation(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        address = network.control_address
        async with Actor(address, incarnation="1") as old, Actor(address, incarnation="2") as new:
            await old.until_leased(4)
            leases = await new.until_leased(4)
            assert [(lease.cursor, lease.attempt) for lease in leases] == [(cursor, 1) for cursor in range(4)]
            await old.goodbye()
            await old.until(lambda: True)
            assert (await new.answer(leases[0])).outcome == "accepted"
            await new.until_status()
            assert len(new.leases) == 4, "the goodbye of the old incarnation must not free the leases of the new one"


async def test_goodbye_frees_leases(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        address = network.control_address
        async with Actor(address) as leaving, Actor(address, name="actor-1") as staying:
            await leaving.until_leased(4)
            await staying.until_status()
            assert staying.leases == []
            await leaving.goodbye()
            await staying.until(lambda: len(staying.leases) == 4)


async def test_a_lease_that_no_heartbeat_names_is_issued_again(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path, timeouts=LeaseTimeouts(60.0, lost_after_s=0.0))) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            await actor.until_leased(4)
            actor.held = {lease.lease_id for lease in actor.leases[1:]}
            await actor.until_leased(5)
            assert (actor.leases[-1].cursor, actor.leases[-1].attempt) == (0, 1)


async def test_a_restarted_learner_keeps_groups_and_leases(tmp_path: Path) -> None:
    """Buffered groups are kept, running leases stay with their actors, lease ids are not reused."""
    setting = Setting(tmp_path)
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            leases: list[Lease] = list(await actor.until_leased(4))
            assert (await actor.answer(leases[0])).outcome == "accepted"
            assert (await actor.answer(leases[3])).outcome == "accepted"
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address, capacity=16) as actor:
            actor.held = {leases[1].lease_id, leases[2].lease_id}
            await actor.until_status()
            assert actor.leases == []
            assert (await actor.answer(leases[0])).outcome == "duplicate"
            assert (await actor.answer(leases[1])).outcome == "accepted"
            batch = await next_batch(network)
            assert [group.cursor for group in batch] == [0, 1]
            assert batch[0].trajectories[0].contexts[0].token_ids.tolist() == [1, 2, 3, 4]
            await commit_batch(network, batch)
    with open_network(setting) as network:
        again = await asyncio.to_thread(network.run, network.coordinator.recorded_batch(0))
        assert [group.cursor for group in again] == [0, 1]
        await serve_version(network, 1)
        async with Actor(network.control_address) as actor:
            actor.held = {leases[2].lease_id}
            fresh = await actor.until_leased(2)
            assert [lease.cursor for lease in fresh] == [4, 5]
            assert min(lease.lease_id for lease in fresh) > max(lease.lease_id for lease in leases)


async def test_leases_of_an_actor_that_never_returns_expire(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            await actor.until_leased(4)
    with open_network(Setting(tmp_path, timeouts=LeaseTimeouts(lease_timeout_s=0.3))) as network:
        async with Actor(network.control_address, name="actor-1") as actor:
            async with asyncio.timeout(WAIT_S):
                while len(actor.leases) < 4:
                    await report_engine(network, version=0)
                    await actor.until_status()
            assert {lease.attempt for lease in actor.leases} == {1}


async def test_the_older_of_two_actors_with_one_name_is_drained(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        await serve_version(network, 0)
        address = network.control_address
        async with Actor(address, incarnation="1") as old, Actor(address, incarnation="2") as new:
            await old.until_leased(4)
            await new.until_leased(4)
            await old.heartbeat()
            await old.until(lambda: bool(old.drains))
            assert "another actor with the name" in old.drains[-1].reason
            await new.until_status()
            assert len(new.leases) == 4, "the older actor frees no lease"
