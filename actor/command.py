"""`palimpsest actor` and `palimpsest evaluator`."""

from __future__ import annotations

from pathlib import Path

import click

_CONFIG = click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")


@click.command()
@_CONFIG
@click.option("--name", help="Unique among the run's actors.  [default: actor-HOSTNAME-PID]")
@click.option("--check", is_flag=True, help="Check tokenizer, workflow, task, reward and tools, and exit.")
@click.option("--drain-s", type=click.FloatRange(0), help="Set actor.drain_s: how long running groups may finish.")
@_SET
def actor(config: Path, name: str | None, check: bool, drain_s: float | None, overrides: tuple[str, ...]) -> None:
    """Roll out trajectories for the run's learner until the run ends.

    CONFIG is the run's TOML or saved config.json; on another node, give the learner's addresses with --set
    network.host=… and the keys with --set network.keys=DIR. Actors may join and leave at any time. SIGTERM drains:
    the actor takes no new lease, finishes and hands in its groups for at most --drain-s, and gives the other leases
    back. A second signal, or Ctrl-C, ends it at once.
    """
    import asyncio

    from actor.build import run_actor
    from actor.check import check_actor
    from protocol.check_result import raise_first_failure
    from protocol.config_file import load_config
    from protocol.role_name import role_name
    from protocol.role_startup import run_async, start_role

    name = role_name("actor", name)
    start_role(name)
    if drain_s is not None:
        overrides = (*overrides, f"actor.drain_s={drain_s}")
    loaded = load_config(config, overrides)
    if check:
        results = list(check_actor(loaded))
        click.echo("\n".join(map(str, results)))
        raise_first_failure(results)
        click.echo(f"workflow {loaded.workflow.use}, task {loaded.task.use}, reward {loaded.reward.use}: ready to run")
        return
    drain = asyncio.Event()
    run_async(run_actor(loaded, name=name, drain=drain), drain=drain)
    if drain.is_set():
        raise KeyboardInterrupt  # the exit status says that a signal ended it: the launcher restarts the actor


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def evaluator(folder: Path) -> None:
    """Take the samples of the evaluation in FOLDER that are missing, from engines that run already.

    FOLDER contains plan.json and config.json; `palimpsest eval` writes them and starts this role. Results are
    samples.jsonl and report.json. The same command resumes.
    """
    from actor.evaluation.evaluate import run_evaluation
    from protocol.config_file import load_config
    from protocol.evaluation import EvaluationFolder
    from protocol.role_startup import run_async, start_role

    start_role("evaluator")
    evaluation = EvaluationFolder(folder.resolve())
    report = run_async(run_evaluation(load_config(evaluation.config), evaluation.read_plan(), evaluation))
    click.echo(f"evaluator: {report.num_done} samples, {report.num_failed} failed; {evaluation.report}")
