"""`palimpsest check RUN.toml`: everything that can be known before a start, in one line per check.

this process    config, model files, run folder, disk, ports, keys, settings        (preflight.py)
at the same time, a process each:
    palimpsest actor --check        tokenizer, workflow, task, reward, tools, first question
    python -m retriever.check       indexes and their encoders
    palimpsest learner --check      imported algorithms, if there are any
    torch                           GPUs, if learner.device needs one
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from subprocess import Popen

    from protocol.check_result import CheckResult
    from protocol.config import Config

_TIMEOUT_S = 120.0
_NUM_GPUS = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
def check(run: Path, overrides: tuple[str, ...]) -> None:
    """Check everything that can be known before RUN (a TOML file) is started; load no weights, start nothing.

    Each line is ok, warn or fail, with what to do. Exit status 0 if no check failed, else 2.
    """
    import sys

    from protocol.check_result import CheckResult
    from protocol.config_file import load_config
    from protocol.errors import UserError

    try:
        config = load_config(run, overrides)
    except UserError as error:
        failed = report([CheckResult("fail", "config", str(error))])
    else:
        failed = report(run_checks(config, source=run))
    sys.exit(2 if failed else 0)


def report(results: Iterable[CheckResult]) -> bool:
    """Prints each result when it is known, then their numbers. Returns whether one failed."""
    from collections import Counter

    counts: Counter[str] = Counter()
    for result in results:
        counts[result.outcome] += 1
        click.echo(str(result))
    click.echo(f"check: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed")
    return bool(counts["fail"])


def run_checks(config: Config, *, source: Path) -> Iterator[CheckResult]:
    """Yields the results of all checks. `source`: the file that the config was read from."""
    import tempfile

    from learner.launch.preflight import preflight
    from protocol.check_result import CheckResult
    from protocol.config_file import save_config

    yield CheckResult("ok", "config", f"{source} is valid")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config(config, path)
        processes = _start(config, path)
        yield from preflight(config)
        for name, process in processes.items():
            yield from _results(name, process, config)


def _start(config: Config, path: Path) -> dict[str, Popen[str]]:
    """Starts the checks of other roles; name → process."""
    import os
    import subprocess
    import sys

    commands: dict[str, tuple[str, ...]] = {
        "actor": ("learner.launch", "actor", str(path), "--check", "--name", "check")
    }
    if config.retriever.indexes:
        indexes = (f"{name}={folder}" for name, folder in config.retriever.indexes.items())
        commands["retriever"] = ("retriever.check", *indexes)
    algorithms = (config.learner.advantage, config.learner.loss, *config.learner.loss.corrections)
    if any(":" in section.use for section in algorithms):
        commands["learner"] = ("learner.launch", "learner", str(path), "--check")
    argvs: dict[str, tuple[str, ...]] = {name: (sys.executable, "-m", *command) for name, command in commands.items()}
    if config.learner.device.startswith("cuda"):
        argvs["GPU"] = (sys.executable, "-c", _NUM_GPUS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {
        name: subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for name, argv in argvs.items()
    }


def _results(name: str, process: Popen[str], config: Config) -> Iterator[CheckResult]:
    """The results that the process printed. If it printed no failure but failed, its last line is one."""
    import subprocess

    from protocol.check_result import CheckResult

    try:
        output, errors = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        yield CheckResult("fail", name, f"its check did not end in {_TIMEOUT_S:g} s")
        return
    if name == "GPU" and process.returncode == 0:
        yield _gpus(config, num_gpus=int(output))
        return
    results = [result for line in output.splitlines() if (result := CheckResult.parse(line)) is not None]
    yield from results
    if process.returncode and not any(result.outcome == "fail" for result in results):
        last = next(iter(reversed(errors.strip().splitlines())), f"exit status {process.returncode}")
        yield CheckResult("fail", name, last.removeprefix("error: "))
    elif not results:
        yield CheckResult("ok", name, " ".join(output.split()) or "no problem was found")


def _gpus(config: Config, *, num_gpus: int) -> CheckResult:
    from protocol.check_result import CheckResult

    device, ranks = config.learner.device, config.learner.ranks
    number = device.partition(":")[2]
    needed = max(ranks, int(number) + 1 if number.isdigit() else 1)
    if num_gpus < needed:
        return CheckResult(
            "fail",
            "GPU",
            f"learner.device = {device!r} with learner.ranks = {ranks} needs {needed}, torch finds {num_gpus} on this "
            "machine: set learner.device = 'cpu', or install a driver and a torch that fit the GPU",
        )
    return CheckResult("ok", "GPU", f"torch finds {num_gpus}")
