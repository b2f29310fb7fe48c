"""`palimpsest up RUN.toml`: all roles of a run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from learner.launch.plan import ProcessSpec
    from protocol.config import Config


@click.command()
@click.argument("run", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
@click.option("--dry-run", is_flag=True, help="Print what would start, and start nothing.")
@click.option("--quiet", is_flag=True, help="No live view.")
@click.option("--check-drift", is_flag=True, help="Rate 0: the mismatch between engines and learner must stay flat.")
def up(run: Path, overrides: tuple[str, ...], dry_run: bool, quiet: bool, check_drift: bool) -> None:
    """Start, supervise and restart the roles that RUN (a TOML file) names, until its last step.

    Ctrl-C stops all of them; running it again resumes. Logs are in the run's folder under logs/, TensorBoard's files
    under tensorboard/, checkpoints under checkpoints/.
    """
    import logging

    from learner.launch.plan import plan, with_ports
    from protocol.config_file import load_config, save_config
    from protocol.role_startup import run_async

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if check_drift:
        overrides = (*overrides, "learner.check_drift=true")
    config = with_ports(load_config(run, overrides))
    saved = config.run.dir / "config.json"
    processes = plan(config, config_path=saved)
    if dry_run:
        for process in processes:
            click.echo(f"{process.name}: {' '.join(process.argv)}")
        return
    check(config)
    if is_finished(config):
        click.echo(f"up: {config.run.name} was at its last step, {config.learner.num_steps}, before")
        return
    save_config(config, saved)
    try:
        run_async(run_all(config, processes, quiet=quiet))
    except KeyboardInterrupt:
        click.echo("up: stopped; the same command goes on where it was")
        raise
    click.echo(
        f"up: {config.run.name} is at its last step, {config.learner.num_steps}; it is in {config.run.dir}/checkpoints"
    )
    if check_drift:
        click.echo((config.run.dir / "drift.txt").read_text().rstrip())
    click.echo(f"next: palimpsest audit {config.run.dir}; tensorboard --logdir {config.run.dir}/tensorboard")


def is_finished(config: Config) -> bool:
    """Whether a learner has already trained this run to `learner.num_steps`."""
    import json

    from learner.store.run_folder import RunFolder

    path = RunFolder(config.run.dir).finished
    return path.is_file() and json.loads(path.read_text())["step"] >= config.learner.num_steps


def check(config: Config) -> None:
    """What can be known to be wrong before anything starts. Raises: DataError, SecurityError."""
    from protocol.addresses import is_loopback
    from protocol.errors import DataError, SecurityError

    for key, path in [("model.path", config.model.path), *config.retriever.indexes.items()]:
        if not path.is_dir():
            name = key if key == "model.path" else f"retriever.indexes.{key}"
            raise DataError(f"{name}: no folder {path}")
    if not (config.model.path / "tokenizer.json").is_file():
        raise DataError(f"model.path: {config.model.path} has no tokenizer.json; save the model's fast tokenizer there")
    for key in ("questions", "eval_questions"):
        for path in getattr(config.task, key):
            if not path.is_file():
                raise DataError(f"task.{key}: no file {path}")
    if not is_loopback(config.network.control_address) and config.network.keys is None:
        raise SecurityError(
            f"network.host {config.network.host} is beyond loopback and needs CURVE keys: run `palimpsest keys DIR` "
            "and set network.keys to DIR"
        )
    if not is_loopback(config.network.control_address) and config.engine.count and config.network.api_key_file is None:
        raise SecurityError(
            f"network.host {config.network.host} is beyond loopback and engines speak HTTP there: write a long random "
            "word into a file and set network.api_key_file to it"
        )


async def run_all(config: Config, processes: list[ProcessSpec], *, quiet: bool) -> None:
    """Until the learner is done. Raises: UserError, RunFailed."""
    from learner.launch.supervisor import Supervisor
    from learner.launch.view import show_while, view_of

    async with Supervisor(config.run.dir) as supervisor:
        await supervisor.start(processes)
        await show_while(view_of(config, supervisor.states, quiet=quiet), supervisor.wait("learner"))
