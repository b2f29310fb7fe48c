"""`palimpsest up RUN.toml`: runs all processes of a run on this machine.

RUN.toml ─► config with ports ─► check ─► process plan ─► lock ─► RUN/config.json ─► supervisor + live view ─► last step
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from learner.launch.process_plan import ProcessSpec
    from protocol.config import Config


@click.command()
@click.argument("run", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the processes, check the run as `palimpsest check` does, and exit.",
)
@click.option("--quiet", is_flag=True, help="Show no live view.")
@click.option(
    "--check-drift",
    is_flag=True,
    help="Train with learning rate 0 and report how the mismatch between engines and learner changes.",
)
@click.pass_context
def up(
    ctx: click.Context, run: Path, overrides: tuple[str, ...], dry_run: bool, quiet: bool, check_drift: bool
) -> None:
    """Start the roles that RUN (a TOML file) configures, and restart those that fail, until the run's last step.

    Ctrl-C stops them; the same command resumes the run. The run's folder contains logs/, tensorboard/ and
    checkpoints/.
    """
    from learner.launch.check import report, run_checks
    from learner.launch.command_line import command_line
    from learner.launch.preflight import check_folders, check_network
    from learner.launch.process_plan import plan, with_ports
    from learner.store.run_folder import RunFolder
    from protocol.config_file import load_config
    from protocol.role_startup import run_async

    if check_drift:
        overrides = (*overrides, "learner.check_drift=true")
    config = with_ports(load_config(run, overrides))
    folder = RunFolder(config.run.dir)
    processes = plan(config, config_path=folder.config)
    if dry_run:
        for process in processes:
            click.echo(f"{process.name}: {' '.join(process.argv)}")
        ctx.exit(2 if report(run_checks(config, source=run)) else 0)
    check_folders(config)
    check_network(config)
    if is_finished(config):
        click.echo(f"up: {config.run.name} has already completed its last step, {config.learner.num_steps}")
        return
    try:
        run_async(run_all(config, processes, quiet=quiet))
    except KeyboardInterrupt:
        click.echo("up: stopped; the same command resumes the run")
        raise
    click.echo(
        f"up: {config.run.name} has completed its last step, {config.learner.num_steps}; "
        f"its checkpoints are in {folder.checkpoints}"
    )
    if check_drift:
        click.echo(folder.drift.read_text().rstrip())
    click.echo(f"next:  {command_line('palimpsest', 'audit', folder.root)}")
    click.echo(f"       {command_line('tensorboard', '--logdir', folder.tensorboard)}")


def is_finished(config: Config) -> bool:
    """Whether a learner has already trained this run to `learner.num_steps`."""
    import json

    from learner.store.run_folder import RunFolder

    path = RunFolder(config.run.dir).finished
    return path.is_file() and json.loads(path.read_text())["step"] >= config.learner.num_steps


async def run_all(config: Config, processes: list[ProcessSpec], *, quiet: bool) -> None:
    """Locks the folder, writes config.json and runs the processes until the learner ends.

    Raises: UserError, TrainingStopped, RunFailed.
    """
    from learner.launch.engine_token import with_engine_token
    from learner.launch.live_view import FINISHED, TRAINING, view_of
    from learner.launch.process_plan import extension_checks
    from learner.launch.supervisor import Supervisor
    from learner.store.run_folder import RunFolder
    from protocol.config_file import save_config
    from protocol.errors import DataError

    path = RunFolder(config.run.dir).config
    async with Supervisor(config.run.dir) as supervisor:
        try:
            config = with_engine_token(config, RunFolder(config.run.dir).engine_token)
            save_config(config, path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
        view = view_of(config, supervisor.states, quiet=quiet)
        async with view.shown():
            view.phase = "checking the extensions"
            for check_process in extension_checks(config, config_path=path):
                await supervisor.run(check_process)
            view.phase = TRAINING
            await supervisor.start(processes)
            await supervisor.wait("learner")
            view.phase = FINISHED
