"""Takes the state of a run from the scheduler, for `wait_cause` and progress.json. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from learner.leases.scheduler import Scheduler
from learner.leases.wait_cause import RunState
from protocol.weight_messages import EngineReport


def run_state(
    scheduler: Scheduler,
    *,
    engines: Sequence[EngineReport],
    num_refused_actors: int,
    is_disk_full: bool,
    now_s: float,
) -> RunState:
    """`engines`: the last report of each one. `now_s`: on the scheduler's clock. See `RunState`."""
    lease_table, outcomes = scheduler.lease_table, scheduler.outcomes
    num_missing, oldest = lease_table.missing()
    return RunState(
        step=lease_table.step,
        groups_per_batch=lease_table.groups_per_batch,
        staleness_bound=lease_table.staleness_bound,
        num_ready=lease_table.groups_per_batch - num_missing,
        oldest_lease=None if oldest is None else (oldest.actor, now_s - oldest.granted_s),
        num_actors=len(scheduler.actors),
        num_refused_actors=num_refused_actors,
        engines=tuple(engines),
        serving=frozenset(engine.name for engine in scheduler.serving),
        is_disk_full=is_disk_full,
        failures=outcomes.total.most_common(),
        recent_failures=outcomes.since_accepted.most_common(),
        num_failed_in_a_row=outcomes.num_failed_in_a_row,
        num_skipped_in_a_row=outcomes.num_skipped_in_a_row,
        skipped_reward=outcomes.skipped_reward,
        fatal_questions=tuple(outcomes.fatal_questions),
        first_samples=tuple(outcomes.first_samples.samples) if outcomes.first_samples.is_complete else (),
    )
