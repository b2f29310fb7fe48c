"""`palimpsest audit`: checks the guarantees of a run with the data of its store only.

It uses no metrics. It counts questions by state, computes the age of each trained token from the step of its batch and
the version in its span, and checks that every batch has B different groups, each trained once. For groups whose tokens
were dropped (`learner.retention`), it reads the stored tally.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from learner.store.retention import Tally
    from learner.store.store import Store


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit. `problems` is empty if every guarantee holds.

    num_leased = num_trained + num_buffered + num_skipped + num_expired + num_running, in questions

    num_expired          questions that wait to be issued again
    num_groups_lost      acknowledged groups that are not in the store
    num_tokens_masked    over-age tokens of overtaken stragglers; they were not trained
    staleness_max, mean  age of the trained tokens, in learner steps
    """

    run_id: str
    num_steps: int
    num_leased: int
    num_trained: int
    num_buffered: int
    num_skipped: int
    num_expired: int
    num_running: int
    num_lease_attempts: int
    num_reissued: int
    num_overtaken: int
    num_groups_lost: int
    num_trajectories_trained: int
    num_contexts_trained: int
    num_tokens_trained: int
    num_tokens_masked: int
    num_publications: int
    staleness_bound: int
    staleness_max: int
    staleness_mean: float
    problems: tuple[str, ...] = field(default=())


def audit_run(run_dir: Path) -> Audit:
    """Audits the run in a folder. Raises: DataError if it has no store."""
    from learner.store.run_folder import RunFolder
    from learner.store.store import Store
    from protocol.errors import DataError

    path = RunFolder(run_dir).store
    if not path.is_file():
        raise DataError(f"no run in {run_dir}: {path.name} is missing")
    store = Store(path, read_only=True)
    try:
        with store.snapshot():
            return _audit(store)
    finally:
        store.close()


def _audit(store: Store) -> Audit:
    from learner.store.resume_key import run_facts

    facts = run_facts(store.meta())
    batch_size, bound = facts.groups_per_batch, facts.staleness_bound
    states = dict(store.query("SELECT state, count(*) FROM entries GROUP BY state"))
    leased = store.query("SELECT count(DISTINCT cursor) FROM leases")[0][0]
    trained = _count_trained(store, bound, last_context_only=facts.last_context_only)
    problems = [*_check_batches(store, batch_size), *_check_entries(store), *trained.problems(bound)]
    if leased != sum(states.values()):
        problems.append(f"{leased} questions were leased, but {sum(states.values())} are accounted for")
    stored = {row[0] for row in store.query("SELECT cursor FROM groups")}
    acknowledged = {
        row[0] for row in store.query("SELECT DISTINCT cursor FROM leases WHERE outcome IN ('accepted', 'skipped')")
    }
    lost = acknowledged - stored
    if lost:
        problems.append(f"{len(lost)} acknowledged groups are not in the store: {sorted(lost)[:5]}")
    attempts = store.query("SELECT count(*) FROM leases")[0][0]
    return Audit(
        run_id=facts.run_id,
        num_steps=store.num_batches(),
        num_leased=leased,
        num_trained=states.get("trained", 0),
        num_buffered=states.get("buffered", 0),
        num_skipped=states.get("skipped", 0),
        num_expired=states.get("waiting", 0),
        num_running=states.get("running", 0),
        num_lease_attempts=attempts,
        num_reissued=attempts - leased,
        num_overtaken=store.query("SELECT count(*) FROM moves WHERE to_slot > from_slot")[0][0],
        num_groups_lost=len(lost),
        num_trajectories_trained=trained.num_trajectories,
        num_contexts_trained=trained.num_contexts,
        num_tokens_trained=sum(trained.ages.values()),
        num_tokens_masked=trained.num_masked,
        num_publications=len(store.publications()),
        staleness_bound=bound,
        staleness_max=max(trained.ages, default=0),
        staleness_mean=trained.mean_age,
        problems=tuple(problems),
    )


def _check_batches(store: Store, batch_size: int) -> list[str]:
    problems = []
    sizes = dict(store.query("SELECT step, count(DISTINCT cursor) FROM batches GROUP BY step"))
    if sorted(sizes) != list(range(len(sizes))):
        problems.append(f"the log of batches has a gap: steps {sorted(sizes)[:3]} … of {len(sizes)}")
    problems += [f"batch {step} has {n} groups, not {batch_size}" for step, n in sizes.items() if n != batch_size]
    num_missing = store.query("SELECT count(*) FROM batches WHERE cursor NOT IN (SELECT cursor FROM groups)")[0][0]
    if num_missing:
        problems.append(f"{num_missing} groups were trained that are not in the store")
    num_misplaced = store.query(
        "SELECT count(*) FROM batches JOIN entries USING (cursor) WHERE entries.slot / ? != batches.step", batch_size
    )[0][0]
    if num_misplaced:
        problems.append(f"{num_misplaced} groups were trained in another batch than the one of their slot")
    return problems


def _check_entries(store: Store) -> list[str]:
    in_batches = "cursor IN (SELECT cursor FROM batches)"
    in_groups = "cursor IN (SELECT cursor FROM groups)"
    running = "SELECT cursor FROM leases WHERE outcome = 'running'"
    leased_slot = "SELECT slot FROM leases WHERE leases.cursor = entries.cursor ORDER BY lease_id DESC LIMIT 1"
    moved_there = "SELECT 1 FROM moves WHERE moves.cursor = entries.cursor AND to_slot = entries.slot"
    shared = "SELECT slot FROM entries GROUP BY slot HAVING count(*) > 1"
    checks = {
        "questions are trained but in no batch": f"state = 'trained' AND NOT {in_batches}",
        "questions are in a batch but not trained": f"state != 'trained' AND {in_batches}",
        "questions have no stored group": f"state IN ('trained', 'buffered') AND NOT {in_groups}",
        "questions share a slot": f"slot >= 0 AND slot IN ({shared})",
        "questions run without a lease": f"state = 'running' AND cursor NOT IN ({running})",
        "questions are in another slot than they were leased for": f"slot >= 0 AND slot != ({leased_slot}) "
        f"AND NOT EXISTS ({moved_there})",
    }
    counts = {
        problem: store.query(f"SELECT count(*) FROM entries WHERE {where}")[0][0] for problem, where in checks.items()
    }
    return [f"{count} {problem}" for problem, count in counts.items() if count]


@dataclass(slots=True)
class _TrainedCounts:
    """Counts over the groups of all trained batches. `ages`: age in steps → number of trained tokens."""

    num_masked: int = 0
    num_trajectories: int = 0
    num_contexts: int = 0
    num_unknown_spans: int = 0
    ages: dict[int, int] = field(default_factory=dict)

    @property
    def mean_age(self) -> float:
        return sum(age * count for age, count in self.ages.items()) / max(1, sum(self.ages.values()))

    def problems(self, bound: int) -> list[str]:
        over = sum(count for age, count in self.ages.items() if age > bound)
        checks = {
            f"trained tokens are older than the bound of {bound}": over,
            "spans name a publication that was never made": self.num_unknown_spans,
            "tokens come from a version that did not exist yet": sum(n for age, n in self.ages.items() if age < 0),
        }
        return [f"{count} {problem}" for problem, count in checks.items() if count]


def _count_trained(store: Store, bound: int, *, last_context_only: bool) -> _TrainedCounts:
    """Reads every group of every trained batch, or its tally if its tokens were dropped."""
    publications = store.publications()
    overtaken = {row[0] for row in store.query("SELECT cursor FROM moves WHERE to_slot > from_slot")}
    trained = _TrainedCounts()
    for step in range(store.num_batches()):
        for cursor in store.batch(step):
            tally = _tally(store, cursor, last_context_only=last_context_only)
            if tally is None:
                continue
            trained.num_trajectories += tally.num_trajectories
            trained.num_contexts += tally.num_contexts
            for version, publication, num_tokens in tally.tokens:
                age = step - version
                trained.num_unknown_spans += publications.get(publication) != version
                if age > bound and cursor in overtaken:
                    trained.num_masked += num_tokens
                else:
                    trained.ages[age] = trained.ages.get(age, 0) + num_tokens
    return trained


def _tally(store: Store, cursor: int, *, last_context_only: bool) -> Tally | None:
    """The tally of a group, computed from its tokens or read if they were dropped; None if there is no such group."""
    import json

    from learner.store.retention import Tally

    rows = store.query("SELECT num_bytes, tally FROM groups WHERE cursor = ?", cursor)
    if not rows:
        return None
    if rows[0][0]:
        return Tally.of(store.group(cursor), last_context_only=last_context_only)
    return Tally(**json.loads(rows[0][1]))


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def audit(ctx: click.Context, run: Path, as_json: bool) -> None:
    """Check the guarantees of the run in the folder RUN. Exit status 1 if one does not hold."""
    import json

    result = audit_run(run)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        _print(result)
    ctx.exit(1 if result.problems else 0)


def _print(result: Audit) -> None:
    click.echo(
        f"audit of {result.run_id}: {result.num_steps} steps\n"
        f"  leased {result.num_leased} = trained {result.num_trained} + buffered {result.num_buffered} + skipped "
        f"{result.num_skipped} + expired {result.num_expired} + running {result.num_running}\n"
        f"  lease attempts {result.num_lease_attempts}, of which issued again {result.num_reissued}; "
        f"acknowledged groups lost {result.num_groups_lost}; overtaken {result.num_overtaken}\n"
        f"  age of trained tokens: mean {result.staleness_mean:.2f}, max {result.staleness_max}, "
        f"bound {result.staleness_bound}; {result.num_tokens_masked} tokens over age, masked\n"
        f"  publications {result.num_publications}, trained: {result.num_trajectories_trained} trajectories, "
        f"{result.num_contexts_trained} contexts, {result.num_tokens_trained} tokens"
    )
    for problem in result.problems:
        click.echo(f"  PROBLEM: {problem}")
    click.echo("audit: clean" if not result.problems else f"audit: {len(result.problems)} problems")
