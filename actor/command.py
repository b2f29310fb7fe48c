"""`palimpsest actor` and `palimpsest eval`."""

from __future__ import annotations

from pathlib import Path

import click

_CONFIG = click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")


@click.command()
@_CONFIG
@click.option("--name", help="Unique among the run's actors.  [default: actor-HOSTNAME-PID]")
@click.option("--check", is_flag=True, help="Load workflow, task, reward and tools, report the first error, and exit.")
@_SET
def actor(config: Path, name: str | None, check: bool, overrides: tuple[str, ...]) -> None:
    """Roll out trajectories for the run's learner until the run ends.

    CONFIG is the run's TOML or saved config.json; on another node, give the learner's addresses with --set
    network.host=… and the keys with --set network.keys=DIR. Actors may join and leave at any time.
    """
    from actor.build import check_extensions, run_actor
    from protocol.config_file import load_config
    from protocol.role_name import role_name
    from protocol.role_startup import run_async, start_role

    name = role_name("actor", name)
    start_role(name)
    loaded = load_config(config, overrides)
    if check:
        check_extensions(loaded)
        click.echo(f"workflow {loaded.workflow.use}, task {loaded.task.use}, reward {loaded.reward.use}: ready to run")
        return
    run_async(run_actor(loaded, name=name))


@click.command("eval")
@_CONFIG
@click.option("--engine", "engines", multiple=True, metavar="URL", help="Engines to ask.  [default: the config's]")
@click.option(
    "--questions", type=click.IntRange(1), default=512, show_default=True, help="How many evaluation questions."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--concurrency", type=click.IntRange(1), default=128, show_default=True, help="Trajectories at once.")
@click.option("--version", type=click.IntRange(0), help="Wait until the engines serve this version.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the summary as JSON here.")
@click.option("--trajectories", type=click.Path(path_type=Path, dir_okay=False), help="Write each one as JSONL here.")
@_SET
def evaluate(
    config: Path,
    engines: tuple[str, ...],
    questions: int,
    temperature: float,
    concurrency: int,
    version: int | None,
    out: Path | None,
    trajectories: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Run the workflow on the task's evaluation questions and report accuracy and token cost."""
    import json

    from actor.evaluation.evaluate import EvaluationPlan, run_evaluation
    from protocol.config_file import load_config
    from protocol.role_startup import run_async, start_role

    start_role("eval")
    plan = EvaluationPlan(
        engines=engines,
        num_questions=questions,
        temperature=temperature,
        concurrency=concurrency,
        version=version,
        out=out,
        trajectories=trajectories,
    )
    summary = run_async(run_evaluation(load_config(config, overrides), plan))
    click.echo(json.dumps(summary, indent=2))
