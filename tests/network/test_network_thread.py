"""The network thread: failures at start and while it runs."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from learner.leases.admission import Rules
from learner.leases.decisions import Record
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.network.network_thread import THREAD_NAME, NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.config import NetworkConfig
from protocol.errors import PalimpsestError, SecurityError, StoreError, UnreachableError
from tests.network.peers import WAIT_S, Actor, Setting, open_network, serve_version


def network_thread(store: Store, network: NetworkConfig) -> NetworkThread:
    return NetworkThread(
        network=network,
        store=store,
        lease_table=LeaseTable(groups_per_batch=1, staleness_bound=0, num_steps=1),
        rules=Rules("run", 1, 1, False),
        timeouts=LeaseTimeouts(lease_timeout_s=1.0),
        on_death=lambda: None,
    )


def test_entering_raises_the_error_if_it_cannot_listen(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        closing(Store(RunFolder(tmp_path).store)) as store,
    ):
        port = taken.getsockname()[1]
        for network, error, message in (
            (NetworkConfig(control_port=port), UnreachableError, f"cannot listen on tcp://127.0.0.1:{port}: .* in use"),
            (NetworkConfig(host="0.0.0.0"), SecurityError, "beyond loopback and needs CURVE keys"),
        ):
            with pytest.raises(error, match=message), network_thread(store, network):
                pass


def test_a_thread_that_cannot_start_has_ended_when_entering_raises(tmp_path: Path) -> None:
    """Otherwise it would use the store after the caller has closed it, which ends the process with SIGSEGV."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        closing(Store(RunFolder(tmp_path).store)) as store,
    ):
        failing = network_thread(store, NetworkConfig(control_port=taken.getsockname()[1]))
        with pytest.raises(UnreachableError, match="cannot listen"):
            failing.__enter__()
        assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}


class FailingStore(Store):
    """A store whose disk fails once `fails` is set."""

    fails = False

    def commit(self, records: Sequence[Record]) -> None:
        if self.fails:
            raise StoreError("disk I/O error")
        super().commit(records)


async def test_an_error_in_the_thread_calls_on_death_and_is_raised_when_leaving(tmp_path: Path) -> None:
    died = threading.Event()
    store = FailingStore(RunFolder(tmp_path).store)
    with (  # noqa: PT012
        pytest.raises(PalimpsestError, match="disk I/O error"),
        open_network(Setting(tmp_path), store=store, on_death=died.set) as network,
    ):
        await serve_version(network, 0)
        store.fails = True
        async with Actor(network.control_address) as actor:
            await actor.heartbeat()
            assert await asyncio.to_thread(died.wait, WAIT_S)
