"""`palimpsest learner`: runs the learner process."""

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
    help="Train on the batches recorded in the run folder RUN, without any server.",
)
@click.option(
    "--check-drift",
    is_flag=True,
    help="Train with learning rate 0 and report how the mismatch between engines and learner changes.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Load advantage estimator, policy loss and corrections, report the first error, and exit.",
)
def learner(config: Path, overrides: tuple[str, ...], replay: Path | None, check_drift: bool, check: bool) -> None:
    """Run the learner: it leases questions, receives groups, trains on them and publishes weights.

    CONFIG is the run's TOML, or the config.json that `palimpsest up` saved in the run's folder. The same command
    resumes from the newest checkpoint and the recorded batches. With --replay, metrics and checkpoints are written to
    RUN/replay, or to the run.dir given with --set. If learner.ranks is above 1, the command starts torchrun;
    see docs/scaling.md.
    """
    from protocol.config_file import load_config, require_ports
    from protocol.role_startup import start_role

    start_role("learner")
    if check_drift:
        overrides = (*overrides, "learner.check_drift=true")
    if replay is not None:
        overrides = (f"run.dir={replay / 'replay'}", *overrides)
    loaded = load_config(config, overrides)
    if check:
        from learner.algorithms.check import check_algorithms

        check_algorithms(loaded)
        click.echo(f"advantage {loaded.learner.advantage.use}, loss {loaded.learner.loss.use}: ready to run")
        return
    if replay is None:
        require_ports(loaded, "network.control_port", "network.weights_port", "network.announce_port")
    if loaded.learner.ranks > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        _run_ranks(loaded.learner.ranks)

    from learner.build import run_learner, run_replay  # slow (torch), so only after the config is checked

    if replay is None:
        run_learner(loaded)
    else:
        run_replay(loaded, replay)


def _run_ranks(num_ranks: int) -> NoReturn:
    """Runs this command line under torchrun, once per rank; exits with the status of the first rank that failed."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the rank has logged the error
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = ["--standalone", "--nproc-per-node", str(num_ranks), "-m", "learner.launch"]
    try:
        torchrun([*options, *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException:
        sys.exit(143)
    sys.exit(0)
