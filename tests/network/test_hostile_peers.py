"""The coordinator and the publisher under a storm of hostile messages: other peers are served."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from learner.store.audit import audit_run
from protocol.codec import encode_group
from protocol.transport import Dealer, Transport
from tests.fuzz.mutate import mutated
from tests.fuzz.samples import sample_messages
from tests.leases.groups import make_group
from tests.network.peers import WAIT_S, Actor, Setting, open_network, report_engine

NUM_MESSAGES = 2_000


async def storm(dealer: Dealer, *, seed: int, good: list[list[bytes]]) -> None:
    rng = random.Random(seed)
    for _ in range(NUM_MESSAGES):
        await dealer.send(mutated(rng, good, tree="msgpack") or [b""], timeout_s=WAIT_S)


async def test_hostile_messages_do_not_disturb_other_peers(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    with open_network(setting) as network:
        publication = await asyncio.to_thread(network.run, network.coordinator.new_publication(0))
        await report_engine(network, version=0, publication=publication)
        async with Actor(network.control_address) as actor:
            leases = list(await actor.until_leased(4))  # all leases that the bound allows: hostile actors get none
            group = [bytes(frame) for frame in encode_group(make_group(leases[0]), lease_id=leases[0].lease_id)]
            good = [*sample_messages(), group[:1], group[:3]]  # never a whole group: it would be accepted
            transport = Transport()
            try:
                addresses = (network.control_address, network.weights_address, network.control_address)
                storms = [
                    storm(transport.dealer(address), seed=seed, good=good) for seed, address in enumerate(addresses)
                ]
                storming = asyncio.gather(*storms)
                for lease in leases:
                    assert (await actor.answer(lease)).outcome == "accepted"
                await storming
                await report_engine(network, version=0, publication=publication)
                await actor.until_status()
            finally:
                transport.close()
            async with asyncio.timeout(WAIT_S):
                batch = await asyncio.to_thread(network.run, network.coordinator.next_batch())
                await asyncio.to_thread(network.run, network.coordinator.commit_batch([each.cursor for each in batch]))
        assert network.coordinator.num_dropped > 0
        assert network.publisher.num_dropped > 0
    audit = audit_run(tmp_path)
    assert audit.problems == ()
    assert (audit.num_trained, audit.num_groups_lost) == (2, 0)
