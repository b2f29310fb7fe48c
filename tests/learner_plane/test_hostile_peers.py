"""The coordinator and the publisher under a storm of hostile messages: honest peers get what they came for."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.transport import Dealer, Transport
from tests.fuzz.mutate import mutated
from tests.fuzz.samples import sample_messages
from tests.learner_plane.peers import (
    GROUP_SIZE,
    RUN,
    WAIT_S,
    Actor,
    Setting,
    control_address,
    make_group,
    open_plane,
    report_engine,
    weights_address,
)

NUM_MESSAGES = 2_000


async def storm(dealer: Dealer, *, seed: int, good: list[list[bytes]]) -> None:
    rng = random.Random(seed)
    for _ in range(NUM_MESSAGES):
        await dealer.send(mutated(rng, good, tree="msgpack") or [b""], timeout_s=WAIT_S)


async def test_a_storm_costs_others_nothing(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    store = Store(RunFolder(tmp_path).store)
    store.claim({"run_id": RUN, "groups_per_batch": "2", "group_size": str(GROUP_SIZE), "staleness_bound": "1"})
    store.close()
    with open_plane(setting) as plane:
        publication = await asyncio.to_thread(plane.run, plane.coordinator.new_publication(0))
        await report_engine(plane, version=0, publication=publication)
        async with Actor(control_address(plane)) as actor:
            leases = list(await actor.until_leased(4))  # all that there are: what is hostile finds nothing to lease
            group = [bytes(frame) for frame in encode_group(make_group(leases[0]), lease_id=leases[0].lease_id)]
            good = [*sample_messages(), group[:1], group[:3]]  # never the whole: it would be a good answer
            transport = Transport()
            try:
                addresses = (control_address(plane), weights_address(plane), control_address(plane))
                storms = [
                    storm(transport.dealer(address), seed=seed, good=good) for seed, address in enumerate(addresses)
                ]
                storming = asyncio.gather(*storms)
                for lease in leases:
                    assert (await actor.answer(lease)).outcome == "accepted"
                await storming
                await report_engine(plane, version=0, publication=publication)
                await actor.until_status()
            finally:
                transport.close()
            async with asyncio.timeout(WAIT_S):
                batch = await asyncio.to_thread(plane.run, plane.coordinator.next_batch())
                await asyncio.to_thread(plane.run, plane.coordinator.finish_batch([each.cursor for each in batch]))
        assert plane.coordinator._router.num_dropped > 0
        assert plane.publisher._router.num_dropped > 0
    audit = audit_run(tmp_path)
    assert audit.problems == ()
    assert (audit.num_trained, audit.num_groups_lost) == (2, 0)
