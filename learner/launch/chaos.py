"""`palimpsest chaos RUN --seed N`: faults on purpose in a run that goes on, then the audit.

    wait for the first step ─► draw (seeded): whom, what, for how long ─► inflict ─┐
                                 ▲                                   pause         │
                                 └─────────────────────────────────────────────────┘
    until there were enough, or the run nears its end ─► wait for two more steps ─► audit

Faults may overlap. A process is killed less often than its launcher takes for hopeless.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from learner.launch.inflict import Kind, can_cut, inflict
from learner.launch.recovery import full_rate_s, second_step_s
from learner.launch.supervisor import MAX_RESTARTS
from learner.launch.up import is_finished
from learner.launch.view import Steps
from learner.store.audit import audit_run
from learner.store.folder_lock import is_locked
from learner.store.run_folder import RunFolder
from protocol.config_file import load_config
from protocol.errors import DataError, SecurityError
from protocol.role_startup import run_async

KINDS: tuple[Kind, ...] = ("kill", "stop", "slow", "cut")
ROLES = ("learner", "actor", "engine", "retriever")
# How long a process is disturbed. The longest stop is longer than an engine may be silent.
_FOR_S: dict[Kind, tuple[float, float]] = {"kill": (0, 0), "stop": (0.5, 10.0), "slow": (2.0, 10.0), "cut": (0.5, 5.0)}
_POLL_S = 0.1
# No fault so near the end: whoever dies once the learner has left finds nobody to come back to.
_LAST_STEPS = 3
_RECOVERY_TIMEOUT_S = 300.0
_PROCESS = re.compile(r"(learner|actor|engine|retriever)(-\d+)?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; `pause_s` comes before it. `ended_at` (Unix time) is 0 until it has been inflicted."""

    process: str
    kind: Kind
    for_s: float
    pause_s: float
    ended_at: float = 0.0

    @property
    def role(self) -> str:
        return self.process.partition("-")[0]


def draw(rng: random.Random, *, kinds: Sequence[Kind], processes: Sequence[str], every_s: float) -> Fault:
    """Each kind and each process equally likely; pauses exponential with mean `every_s`, at most three times that."""
    kind = rng.choice(kinds)
    return Fault(
        process=rng.choice(processes),
        kind=kind,
        for_s=rng.uniform(*_FOR_S[kind]),
        pause_s=min(3 * every_s, rng.expovariate(1 / every_s)),
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--faults", "num_faults", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@click.option("--every", "every_s", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Mean pause, s.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only these.  [default: all]")
@click.option("--role", "roles", type=click.Choice(ROLES), multiple=True, help="Only these.  [default: all]")
@click.pass_context
def chaos(
    ctx: click.Context,
    run: Path,
    seed: int,
    num_faults: int,
    every_s: float,
    kinds: tuple[Kind, ...],
    roles: tuple[str, ...],
) -> None:
    """Kill, stop (SIGSTOP), slow and cut off processes of RUN, a run's folder, while `up` or `demo` goes on in it.

    Begins after the run's first step. Then the audit: exit status 1 where a promise was broken or the run did not go
    on. What was done is in RUN/chaos.json. On the launcher's machine, as the launcher's user, on Linux.
    """
    chosen = Chaos(run, seed=seed, kinds=kinds or KINDS, roles=roles or ROLES, every_s=every_s)
    recovered = run_async(chosen.run(num_faults=num_faults))
    click.echo(chosen.report())
    problems = audit_run(run).problems
    for problem in problems:
        click.echo(f"  PROBLEM: {problem}")
    if not recovered:
        click.echo(f"  PROBLEM: no two steps in the {_RECOVERY_TIMEOUT_S:.0f} s after the last fault")
    click.echo(f"audit: {'clean' if not problems else f'{len(problems)} problems'}")
    ctx.exit(1 if problems or not recovered else 0)


class Chaos:
    """Faults in the run in `run_dir`. Raises: DataError where no launcher runs there."""

    def __init__(
        self, run_dir: Path, *, seed: int, kinds: Sequence[Kind], roles: Sequence[str], every_s: float
    ) -> None:
        self._run_dir = run_dir
        self._rng = random.Random(seed)
        self._kinds = list(kinds)
        self._roles = roles
        self._every_s = every_s
        self._steps = Steps(RunFolder(run_dir).metrics)
        self._faults: list[Fault] = []
        self._busy: set[str] = set()
        self._killed_at: list[tuple[str, int]] = []
        if not self._is_running():
            raise DataError(f"no launcher runs in {run_dir}: start `palimpsest up` or `palimpsest demo` there first")

    async def run(self, *, num_faults: int) -> bool:
        """Inflicts them, then whether the run has made two more steps, or has come to its end."""
        while self._is_running() and not self._step_times():  # noqa: ASYNC110 (other processes change it)
            await asyncio.sleep(_POLL_S)
        self._drop_cuts_without_permission()
        config = load_config(self._run_dir / "config.json")
        last = config.learner.num_steps - _LAST_STEPS
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_faults):
                fault = await self._next(last_step=last)
                if fault is None:
                    break
                self._busy.add(fault.process)
                tasks.create_task(self._inflict(fault))
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while self._is_running() and not is_finished(config) and None in self._recoveries():
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_S)
        self._write()
        return time.monotonic() <= deadline

    def report(self) -> str:
        counts = Counter(f"{fault.kind} {fault.role}" for fault in self._faults)
        lines = [f"chaos: {len(self._faults)} faults: " + ", ".join(f"{n} x {what}" for what, n in counts.items())]
        for what, seconds in (
            ("the second step came", self._recoveries()),
            ("the run was at full rate again, where no other fault came before,", self._full_rates()),
        ):
            if known := [each for each in seconds if each is not None]:
                lines.append(
                    f"chaos: {what} {statistics.median(known):.1f} s after a fault (median of {len(known)}), "
                    f"{max(known):.1f} s at most"
                )
        return "\n".join(lines)

    def _drop_cuts_without_permission(self) -> None:
        """Raises: SecurityError where nothing is left."""
        if "cut" in self._kinds and not all(can_cut(pid) for pid in self._processes().values()):
            what = "this user may not reach into other processes' sockets (see kernel.yama.ptrace_scope)"
            self._kinds.remove("cut")
            if not self._kinds:
                raise SecurityError(f"--kind cut: {what}; run it as root")
            click.echo(f"chaos: nothing is cut off: {what}")

    async def _next(self, *, last_step: int) -> Fault | None:
        """The next fault, after its pause, when its process runs; None where the run nears its end."""
        fault = None
        while self._is_running() and self._newest_step() < last_step:
            candidates = sorted(name for name in self._processes() if self._may_hit(name))
            if fault is None and candidates:
                fault = draw(self._rng, kinds=self._kinds, processes=candidates, every_s=self._every_s)
                await asyncio.sleep(fault.pause_s)
            elif fault is not None and fault.process in candidates:
                return fault
            else:
                await asyncio.sleep(_POLL_S)
        return None

    async def _inflict(self, fault: Fault) -> None:
        """The process can be hit again when this returns."""
        if fault.kind == "kill":
            self._killed_at.append((fault.process, self._newest_step()))
        click.echo(f"chaos: {fault.kind} {fault.process}" + (f" for {fault.for_s:.1f} s" if fault.for_s else ""))
        if (pid := self._processes().get(fault.process)) and await inflict(fault.kind, pid, for_s=fault.for_s):
            self._faults.append(replace(fault, ended_at=time.time()))
        self._busy.remove(fault.process)

    def _may_hit(self, process: str) -> bool:
        """One fault at a time; and not so many kills that its launcher would give the run up."""
        newest = self._newest_step()
        num_kills = sum(name == process and step == newest for name, step in self._killed_at)
        return process not in self._busy and num_kills < MAX_RESTARTS - 1

    def _processes(self) -> dict[str, int]:
        """Those that the launcher starts again, of the roles wanted: name → pid."""
        try:
            pids: dict[str, int] = json.loads((self._run_dir / "processes.json").read_text())
        except FileNotFoundError:
            return {}
        return {
            name: pid
            for name, pid in pids.items()
            if (match := _PROCESS.fullmatch(name)) is not None and match[1] in self._roles
        }

    def _is_running(self) -> bool:
        return is_locked(RunFolder(self._run_dir).launcher_lock)

    def _newest_step(self) -> int:
        return max(self._step_times(), default=0)

    def _step_times(self) -> dict[int, float]:
        """step → Unix time"""
        self._steps.refresh()
        return {number: step["time"] for number, step in self._steps.by_step.items()}

    def _recoveries(self) -> list[float | None]:
        """To the second step after each fault."""
        times = self._step_times()
        return [second_step_s(fault.ended_at, times) for fault in self._faults]

    def _full_rates(self) -> list[float | None]:
        times, ends = self._step_times(), sorted(fault.ended_at for fault in self._faults)
        return [
            full_rate_s(fault.ended_at, times, others=next((end for end in ends if end > fault.ended_at), None))
            for fault in self._faults
        ]

    def _write(self) -> None:
        rows = [
            {**asdict(fault), "second_step_after_s": second, "full_rate_after_s": full}
            for fault, second, full in zip(self._faults, self._recoveries(), self._full_rates(), strict=True)
        ]
        (self._run_dir / "chaos.json").write_text(json.dumps(rows, indent=2) + "\n")
