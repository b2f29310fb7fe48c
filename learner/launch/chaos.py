"""`palimpsest chaos RUN --seed N`: injects faults into a running run, then audits it.

    wait for the first step ─► draw (seeded): process, kind, duration ─► pause ─► inject ─┐
                                 ▲                                                        │
                                 └────────────────────────────────────────────────────────┘
    until `--faults` were injected or the last steps begin ─► wait for two more steps ─► audit

    task per fault   consumes: a drawn fault, after its pause   waits for: the fault's end
                     produces: a row of RUN/chaos.json; its process may be drawn again

Faults may overlap, but a process has one at a time. A process is killed less often than `RestartPolicy` allows.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from learner.launch.fault_actions import can_cut, inject_fault
from learner.launch.fault_draw import (
    ALL_ROLES,
    KILLS,
    KINDS,
    RUN_KINDS,
    Fault,
    FaultKind,
    RunKind,
    RunPlan,
    draw,
    eligible_processes,
)
from learner.launch.recovery_time import full_rate_s, second_step_s
from learner.launch.run_faults import damage_newest_checkpoint, flood, set_clock_back
from learner.launch.step_log import StepLog
from learner.launch.up import is_finished
from learner.store.audit import audit_run
from learner.store.folder_lock import is_locked
from learner.store.run_folder import RunFolder
from protocol.atomic_write import atomic_write
from protocol.config_file import load_config
from protocol.errors import DataError, SecurityError
from protocol.role_startup import run_async

_POLL_S = 0.1
# No fault in the last steps: a process that restarts after the learner's end has no learner to connect to.
_NUM_LAST_STEPS_WITHOUT_FAULTS = 3
_RECOVERY_TIMEOUT_S = 300.0


class _FaultList(click.ParamType):
    """A comma-separated list of kinds, or `all`."""

    name = "LIST"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        kinds = (*KINDS, *RUN_KINDS) if value == "all" else tuple(value.split(","))
        if unknown := [kind for kind in kinds if kind not in (*KINDS, *RUN_KINDS)]:
            self.fail(f"no such fault: {', '.join(unknown)}; choose from {', '.join((*KINDS, *RUN_KINDS))}, all")
        return kinds


@click.command(context_settings={"show_default": True})
@click.argument("run", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the draws.")
@click.option(
    "--faults", "kinds", type=_FaultList(), default="all", help=f"Of {', '.join((*KINDS, *RUN_KINDS))}; or all."
)
@click.option("--num-faults", type=click.IntRange(1), help="Number of faults.  [default: 20; with --runs, 6 each]")
@click.option("--every", "every_s", type=click.FloatRange(0.1), help="Mean pause in s.  [default: 5; with --runs, 0.3]")
@click.option("--role", "roles", type=click.Choice(ALL_ROLES), multiple=True, help="Only this role; repeatable.")
@click.option("--runs", "num_runs", type=click.IntRange(1), help="Without RUN: start this many runs of the toy task.")
@click.option("--steps", "num_steps", type=click.IntRange(5), default=30, help="With --runs: steps of each run.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="With --runs: keep the runs there.")
@click.pass_context
def chaos(
    ctx: click.Context,
    run: Path | None,
    seed: int,
    kinds: tuple[FaultKind | RunKind, ...],
    num_faults: int | None,
    every_s: float | None,
    roles: tuple[str, ...],
    num_runs: int | None,
    num_steps: int,
    out: Path | None,
) -> None:
    """Inject faults into a run while `up` or `demo` runs in its folder, RUN, then audit it.

    kill: SIGKILL; stop: SIGSTOP for some seconds; slow: stopped 90 % of the time; cut: connections are shut down; full:
    the learner's disk is full; damage: the newest checkpoint is damaged and the learner killed; clock: the learner is
    killed and its clock set back; drain: SIGTERM to an actor; flood: junk messages to the learner. Only with --runs:
    orphan: the learner is stopped and its launcher killed; poison: a question kills the actor that gets it.

    It starts after the run's first step. The exit status is 1 if the audit finds a problem or if the run makes no
    progress after the last fault. RUN/chaos.json lists the faults. With --runs N it starts N runs of the toy task, one
    after another, with the seeds SEED, SEED + 1 …, and prints one line per run and a JSON summary. Linux only; run it
    on the same machine and as the same user as the launcher.
    """
    if (run is None) == (num_runs is None):
        raise click.UsageError("give either RUN or --runs")
    wanted = set(kinds)
    attached: list[FaultKind] = [kind for kind in KINDS if wanted & {kind}]
    if num_runs is not None:
        from learner.launch.chaos_runs import chaos_runs

        run_kinds: list[RunKind] = [kind for kind in RUN_KINDS if wanted & {kind}]
        ok = run_async(
            chaos_runs(
                num_runs=num_runs,
                seed=seed,
                num_steps=num_steps,
                plan=RunPlan(attached, run_kinds, roles or ALL_ROLES, num_faults or 6, every_s or 0.3),
                out=out,
            )
        )
        ctx.exit(0 if ok else 1)
    assert run is not None
    injector = Chaos(run, seed=seed, kinds=attached, roles=roles or ALL_ROLES, every_s=every_s or 5.0)
    recovered = run_async(injector.run(num_faults=num_faults or 20))
    click.echo(injector.report())
    problems = audit_run(run).problems
    for problem in problems:
        click.echo(f"  PROBLEM: {problem}")
    if not recovered:
        click.echo(f"  PROBLEM: fewer than two steps in the {_RECOVERY_TIMEOUT_S:.0f} s after the last fault")
    click.echo(f"audit: {'clean' if not problems else f'{len(problems)} problems'}")
    ctx.exit(1 if problems or not recovered else 0)


class Chaos:
    """Injects faults into the processes of the run in `run_dir`. Raises: DataError if no launcher runs there."""

    def __init__(
        self,
        run_dir: Path,
        *,
        seed: int,
        kinds: Sequence[FaultKind],
        roles: Sequence[str],
        every_s: float,
        echo: Callable[[str], object] = click.echo,
    ) -> None:
        self._echo = echo
        self._run_dir = run_dir
        self._folder = RunFolder(run_dir)
        self._rng = random.Random(seed)
        self._kinds = list(kinds)
        self._roles = roles
        self._every_s = every_s
        self._steps = StepLog(self._folder.metrics)
        self._faults: list[Fault] = []
        self._disturbed: set[str] = set()
        self._kills: list[tuple[str, int]] = []
        if not self._is_running():
            raise DataError(f"no launcher runs in {run_dir}: start `palimpsest up` or `palimpsest demo` there first")

    async def run(self, *, num_faults: int) -> bool:
        """Injects the faults, then waits until two more steps are complete or the run ends. False after a time-out."""
        while self._is_running() and not self._step_times():  # noqa: ASYNC110 (the learner writes them)
            await asyncio.sleep(_POLL_S)
        self._drop_cuts_without_permission()
        config = load_config(self._folder.config)
        last = config.learner.num_steps - _NUM_LAST_STEPS_WITHOUT_FAULTS
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_faults):
                fault = await self._next_fault(last_step=last)
                if fault is None:
                    break
                self._disturbed.add(fault.process)
                tasks.create_task(self._inject(fault))
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while self._is_running() and not is_finished(config) and None in self._recoveries():
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_S)
        self._write()
        return time.monotonic() <= deadline

    def report(self) -> str:
        """The summary to print: number of faults, recovery times."""
        counts = Counter(f"{fault.kind} {fault.role}" for fault in self._faults)
        lines = [f"chaos: {len(self._faults)} faults: " + ", ".join(f"{n} x {what}" for what, n in counts.items())]
        for what, seconds in (
            ("second step complete", self._recoveries()),
            ("full rate again (only faults without another one before that)", self._full_rates()),
        ):
            if known := [each for each in seconds if each is not None]:
                lines.append(
                    f"chaos: {what}: {statistics.median(known):.1f} s after a fault (median of {len(known)}), "
                    f"maximum {max(known):.1f} s"
                )
        return "\n".join(lines)

    def _drop_cuts_without_permission(self) -> None:
        """Removes "cut" from the kinds if this user may not cut. Raises: SecurityError if no kind is left."""
        pids = self._pids()
        names = eligible_processes(pids, roles=self._roles)
        if "cut" in self._kinds and not all(can_cut(pids[name]) for name in names):
            reason = "this user may not access other processes' sockets (see kernel.yama.ptrace_scope)"
            self._kinds.remove("cut")
            if not self._kinds:
                raise SecurityError(f"--faults cut: {reason}; run it as root")
            self._echo(f"chaos: no faults of kind cut: {reason}")

    async def _next_fault(self, *, last_step: int) -> Fault | None:
        """Draws the next fault; returns it after its pause, once its process runs. None after step `last_step`."""
        fault = None
        while self._is_running() and self._newest_step() < last_step:
            candidates = self._candidates()
            if fault is None:
                fault = draw(self._rng, kinds=self._kinds, processes=candidates, every_s=self._every_s)
                await asyncio.sleep(_POLL_S if fault is None else fault.pause_s)
            elif fault.process in candidates:
                return fault
            else:
                await asyncio.sleep(_POLL_S)
        return None

    async def _inject(self, fault: Fault) -> None:
        """Injects a fault and records it; then its process may be drawn again."""
        if fault.kind in KILLS:
            self._kills.append((fault.process, self._newest_step()))
        what = f"{fault.kind} {fault.process}" + (f" for {fault.for_s:.1f} s" if fault.for_s else "")
        if fault.kind == "damage":
            what += f": {damage_newest_checkpoint(self._folder, self._rng) or 'there is no checkpoint yet'}"
        elif fault.kind == "clock":
            set_clock_back(self._folder)
        self._echo(f"chaos: {what}")
        if fault.kind == "flood":
            num_sent = await flood(load_config(self._folder.config), for_s=fault.for_s, rng=self._rng)
            self._echo(f"chaos: flood of {num_sent} messages has ended")
            self._faults.append(replace(fault, ended_at=time.time()))
        elif (pid := self._pids().get(fault.process)) and await inject_fault(fault.kind, pid, for_s=fault.for_s):
            self._faults.append(replace(fault, ended_at=time.time()))
        self._disturbed.remove(fault.process)

    def _candidates(self) -> list[str]:
        return eligible_processes(
            self._pids(),
            roles=self._roles,
            disturbed=self._disturbed,
            kills=self._kills,
            newest_step=self._newest_step(),
        )

    def _pids(self) -> dict[str, int]:
        """The processes that the launcher runs now: name → pid."""
        try:
            return json.loads(self._folder.processes.read_text())
        except FileNotFoundError:
            return {}

    def _is_running(self) -> bool:
        return is_locked(self._folder.launcher_lock)

    def _newest_step(self) -> int:
        return max(self._step_times(), default=0)

    def _step_times(self) -> dict[int, float]:
        """step → Unix time"""
        self._steps.refresh()
        return {number: step["time"] for number, step in self._steps.by_step.items()}

    def _recoveries(self) -> list[float | None]:
        """For each fault, the seconds to the second step after it."""
        times = self._step_times()
        return [second_step_s(fault.ended_at, times) for fault in self._faults]

    def _full_rates(self) -> list[float | None]:
        """For each fault, the seconds until the run was at full rate again."""
        times, ends = self._step_times(), sorted(fault.ended_at for fault in self._faults)
        return [
            full_rate_s(fault.ended_at, times, next_fault_at=next((end for end in ends if end > fault.ended_at), None))
            for fault in self._faults
        ]

    def _write(self) -> None:
        rows = [
            {**asdict(fault), "second_step_after_s": second, "full_rate_after_s": full}
            for fault, second, full in zip(self._faults, self._recoveries(), self._full_rates(), strict=True)
        ]
        atomic_write(self._run_dir / "chaos.json", json.dumps(rows, indent=2) + "\n")
