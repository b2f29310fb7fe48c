"""The status of the run that every heartbeat is answered with. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from learner.leases.lease_table import LeaseTable
from protocol.messages import EngineFields, RunStatus


class CurrentStatus:
    """Makes the status for all actors."""

    def __init__(self, *, run_id: str) -> None:
        self._run_id = run_id
        self._last: RunStatus | None = None

    def message(self, lease_table: LeaseTable, serving: Sequence[EngineFields]) -> RunStatus:
        """Returns the same object until the content changes, so that it is encoded once."""
        last = self._last
        if last is None or last.step != lease_table.step or last.engines != serving:
            last = self._last = RunStatus(
                run_id=self._run_id, step=lease_table.step, num_steps=lease_table.num_steps, engines=list(serving)
            )
        return last
