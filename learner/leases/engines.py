"""The last report of every engine: which engines serve, and with which version. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.messages import EngineFields
from protocol.weight_messages import EngineReport

# An engine whose weight agent has not reported for this long is not counted as serving. Agents report every second.
SILENT_AFTER_S = 5.0


@dataclass(slots=True)
class _Known:
    report: EngineReport
    seen_s: float


def version_to_lease_by(serving: Sequence[EngineFields], *, step: int, staleness_bound: int) -> int | None:
    """s of the lease rule (lease_table.py): the lowest version on the engines that are counted; None if there is none.

    An engine whose version is below `step - staleness_bound` can serve no future lease. It is not counted, so it does
    not block the grant of leases. A reported version above the learner's `step` is treated as `step`.
    """
    versions = [engine.version for engine in serving if engine.version >= step - staleness_bound]
    return min([*versions, step]) if versions else None


class Engines:
    """Engines by name. An engine serves if it has committed a publication and its agent still reports."""

    def __init__(self, *, max_engines: int = 256) -> None:
        self._max_engines = max_engines
        self._known: dict[str, _Known] = {}

    def report(self, report: EngineReport, *, now_s: float) -> bool:
        """Stores the report as the engine's last one, received at `now_s`.

        If there are `max_engines` others, the longest silent one is forgotten. Returns False, and stores nothing, if
        all of them still report.
        """
        name = report.engine.name
        if name not in self._known and len(self._known) >= self._max_engines:
            silent = min(self._known, key=lambda other: self._known[other].seen_s)
            if now_s - self._known[silent].seen_s < SILENT_AFTER_S:
                return False
            del self._known[silent]
        self._known[name] = _Known(report, now_s)
        return True

    def reports(self) -> list[EngineReport]:
        """The last report of every known engine, including engines that no longer report."""
        return [known.report for known in self._known.values()]

    def serving(self, *, now_s: float) -> list[EngineFields]:
        """The engines that serve at `now_s`."""
        return [
            known.report.engine
            for known in self._known.values()
            if now_s - known.seen_s < SILENT_AFTER_S
            and known.report.state in ("serving", "updating")
            and known.report.engine.version >= 0
        ]

    def lowest_version(self, *, now_s: float) -> int | None:
        """The lowest version of the serving engines; None if none serves."""
        return min((engine.version for engine in self.serving(now_s=now_s)), default=None)

    def counters(self, *, now_s: float) -> dict[str, float]:
        """Counter name → sum over the engines whose agent has reported in SILENT_AFTER_S."""
        total: dict[str, float] = {}
        for known in self._known.values():
            if now_s - known.seen_s < SILENT_AFTER_S:
                for name, value in known.report.counters.items():
                    total[name] = total.get(name, 0.0) + value
        return total
