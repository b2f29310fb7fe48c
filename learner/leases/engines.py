"""What the learner knows of the engines: who serves, with what version. Pure but for the time that it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.messages import EngineFields, EngineReport

# An engine whose agent has been silent for so long serves no new lease. Agents report every second.
SILENT_AFTER_S = 5.0


@dataclass(slots=True)
class _Known:
    report: EngineReport
    seen_s: float


def version_to_lease_by(serving: Sequence[EngineFields], *, step: int, staleness_bound: int) -> int | None:
    """s of the lease rule: the lowest version committed on the engines that will serve; None while nobody will.

    An engine that has fallen behind the bound can serve no lease to come, and must not hold the others back; one that
    states a version beyond the learner's `step` raises nothing.
    """
    versions = [engine.version for engine in serving if engine.version >= step - staleness_bound]
    return min([*versions, step]) if versions else None


class Engines:
    """Engines by name. One serves once it has committed a publication and while its agent reports."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def report(self, report: EngineReport, *, now_s: float) -> None:
        self._known[report.engine.name] = _Known(report, now_s)

    def serving(self, *, now_s: float) -> list[EngineFields]:
        return [
            known.report.engine
            for known in self._known.values()
            if now_s - known.seen_s < SILENT_AFTER_S
            and known.report.state in ("serving", "updating")
            and known.report.engine.version >= 0
        ]

    def lowest_version(self, *, now_s: float) -> int | None:
        """None while nobody serves."""
        return min((engine.version for engine in self.serving(now_s=now_s)), default=None)

    def counters(self, *, now_s: float) -> dict[str, float]:
        """The engines' own counters, added up over those that are heard of."""
        total: dict[str, float] = {}
        for known in self._known.values():
            if now_s - known.seen_s < SILENT_AFTER_S:
                for name, value in known.report.counters.items():
                    total[name] = total.get(name, 0.0) + value
        return total
