"""`palimpsest learner`: the learner's process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
@click.option(
    "--replay",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="RUN",
    help="Train the batches that the run in this folder has recorded, without any server.",
)
@click.option("--check-drift", is_flag=True, help="Rate 0: the mismatch between engines and learner must stay flat.")
def learner(config: Path, overrides: tuple[str, ...], replay: Path | None, check_drift: bool) -> None:
    """Train: lease questions, take groups, step, publish weights.

    CONFIG is the run's TOML, or the config.json that `palimpsest up` saved in the run's folder. Run again, it resumes
    from the newest checkpoint and the recorded batches. With --replay, metrics and checkpoints go to RUN/replay, or to
    the run.dir that --set names. With learner.ranks above 1 it runs under torchrun: docs/scaling.md.
    """
    from protocol.config_file import load_config
    from protocol.process import start_role

    start_role("learner")
    if check_drift:
        overrides = (*overrides, "learner.check_drift=true")
    if replay is not None:
        overrides = (f"run.dir={replay / 'replay'}", *overrides)
    loaded = load_config(config, overrides)
    if loaded.learner.ranks > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        _become_torchrun(loaded.learner.ranks)

    from learner.start import run_learner, run_replay  # torch comes with it: a bad config is told before

    if replay is None:
        run_learner(loaded)
    else:
        run_replay(loaded, replay)


def _become_torchrun(num_ranks: int) -> NoReturn:
    """The same command once for each rank; this process becomes their torchrun, and still ends with its launcher."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    arguments = [sys.executable, *torchrun, "-m", "learner.launch", *sys.argv[1:]]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.execv(sys.executable, arguments)
