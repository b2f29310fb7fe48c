"""The coordinator while the disk is full, over real sockets and a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from learner.leases.decisions import Record, Trained
from learner.network.network_thread import NetworkThread
from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.errors import StoreFullError
from tests.leases.groups import make_group
from tests.network.peers import WAIT_S, Actor, Setting, next_batch, open_network, serve_version
from tests.store.full_disk import fill_up, make_room

RETRY_S = 0.1


async def test_a_full_disk_stops_admission_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The actor's heartbeats are answered, its group is not; the group is accepted as soon as there is room."""
    setting = Setting(tmp_path, groups_per_batch=64, full_retry_s=RETRY_S)
    store = Store(RunFolder(tmp_path).store)
    with open_network(setting, store=store) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address, capacity=128) as actor:
            leases = list(await actor.until_leased(64))
            await in_network_thread(network, lambda: fill_up(store))
            sent = 0
            while not has_unanswered(actor, sent):
                await actor.dealer.send(encode_group(make_group(leases[sent]), lease_id=leases[sent].lease_id))
                sent += 1
                await actor.until_status()
            assert sent > 1
            acknowledged = {reply.lease_id for reply in actor.replies if reply.outcome == "accepted"}
            assert {lease.lease_id for lease in leases[: sent - 1]} == acknowledged
            assert "database or disk is full: no group is admitted until there is room" in caplog.text
            gauges = await asyncio.to_thread(network.run, network.coordinator.gauges())
            assert gauges["queue/store_full"] >= 1
            assert gauges["queue/buffered"] == sent - 1
            await in_network_thread(network, lambda: make_room(store))
            last = leases[sent - 1]
            async with asyncio.timeout(WAIT_S):
                while has_unanswered(actor, sent):  # like the runner, resends an unacknowledged group
                    await actor.dealer.send(encode_group(make_group(last), lease_id=last.lease_id))
                    await asyncio.sleep(RETRY_S)
            for lease in leases[sent:]:
                assert (await actor.answer(lease)).outcome == "accepted"
            assert [group.cursor for group in await next_batch(network)] == list(range(64))
    assert audit_run(tmp_path).problems == ()


class FullStore(Store):
    """A store that refuses the next `num_refusals` trained batches, as if the disk were full."""

    num_refusals = 2

    def commit(self, records: Sequence[Record]) -> None:
        if self.num_refusals and any(isinstance(record, Trained) for record in records):
            self.num_refusals -= 1
            raise StoreFullError("the disk is full")
        super().commit(records)


async def test_logging_a_batch_waits_for_room(tmp_path: Path) -> None:
    store = FullStore(RunFolder(tmp_path).store)
    with open_network(Setting(tmp_path, full_retry_s=RETRY_S), store=store) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            for lease in list(await actor.until_leased(4)):
                await actor.answer(lease)
            async with asyncio.timeout(WAIT_S):
                await asyncio.to_thread(network.run, network.coordinator.commit_batch([0, 1]))
            assert store.num_refusals == 0
            assert (store.num_batches(), store.batch(0)) == (1, [0, 1])
            assert [group.cursor for group in await next_batch(network)] == [2, 3]


def has_unanswered(actor: Actor, sent: int) -> bool:
    return len({reply.lease_id for reply in actor.replies}) < sent


async def in_network_thread(network: NetworkThread, action: Callable[[], None]) -> None:
    """Runs `action` in the network thread, which uses the store."""

    async def act() -> None:
        action()

    await asyncio.to_thread(network.run, act())
