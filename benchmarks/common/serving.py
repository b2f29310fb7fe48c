"""Reports an engine that serves, so that the learner grants leases. Nothing listens at the engine's address."""

from __future__ import annotations

import time

from learner.network.network_thread import NetworkThread
from protocol.messages import EngineFields
from protocol.weight_messages import EngineReport

_NEVER_SILENT_S = 3_600.0


def report_serving(network: NetworkThread, *, version: int) -> int:
    """Creates a publication of `version` and reports that the engine has committed it. Returns the publication."""
    publication = network.run(network.coordinator.new_publication(version))
    engine = EngineFields(name="engine", url="http://127.0.0.1:1", version=version, publication=publication)
    report = EngineReport(request_id=1, engine=engine, state="serving")

    async def commit() -> None:
        network.engines.report(report, now_s=time.monotonic() + _NEVER_SILENT_S)
        network.coordinator.engines_changed()

    network.run(commit())
    return publication
