"""`palimpsest learner`: the learner's process."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
def learner(config: Path, overrides: tuple[str, ...]) -> None:
    """Train: lease questions, take groups, step, publish weights.

    CONFIG is the run's TOML, or the config.json that `palimpsest up` saved in the run's folder. Run again, it resumes
    from the newest checkpoint and the recorded batches.
    """
    from protocol.config_file import load_config
    from protocol.process import start_role

    start_role("learner")
    loaded = load_config(config, overrides)

    from learner.loop import run_learner  # torch comes with it: a bad config is told before

    run_learner(loaded)
