"""`palimpsest demo`: the toy's worlds, a warm start, then reinforcement learning through the whole asynchronous path.

    worlds, tokenizer, demonstrations ─► indexes          (one core)
                                      └► warm start       (the other)
    retriever, learner, engine ─► evaluate ─► + actors: RL until the last step ─► evaluate ─► report.json

Every stage leaves its result in the run's folder, so a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from learner.launch.supervisor import Supervisor
    from protocol.config import Config

_NUM_TRAINING_WORLDS = 4
_OPTIONS = "demo.json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What makes a demo the same one, so that it can be resumed."""

    seed: int
    num_steps: int
    num_actors: int
    num_eval_questions: int
    staleness_bound: int
    ablation: str


@dataclass(frozen=True, slots=True)
class Options:
    wanted: Wanted
    run_dir: Path
    quiet: bool

    @property
    def data(self) -> Path:
        return self.run_dir / "toy"

    @property
    def model(self) -> Path:
        return self.run_dir / "warm-start"

    @property
    def worlds(self) -> tuple[int, ...]:
        return tuple(10 * self.wanted.seed + i for i in range(1, _NUM_TRAINING_WORLDS + 1))

    @property
    def eval_world(self) -> int:
        return 10 * self.wanted.seed + 9

    @property
    def all_worlds(self) -> tuple[int, ...]:
        return (*self.worlds, self.eval_world)


@click.command(context_settings={"show_default": True})
@click.option("--seed", type=click.IntRange(0, 1_000_000), default=0, help="Of worlds, first model and evaluation.")
@click.option("--steps", type=click.IntRange(1), default=120, help="Training steps of 16 questions x 8 trajectories.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path, file_okay=False), help="[default: the next free runs/demo-N]"
)
@click.option("--actors", type=click.IntRange(1, 64), default=2, help="Actor processes.")
@click.option("--eval-questions", type=click.IntRange(1), default=512, help="Of an unseen world, before and after.")
@click.option(
    "--staleness", type=click.IntRange(0, 64), default=2, help="Oldest tokens trained, in steps; 0: in turns."
)
@click.option("--quiet", is_flag=True, help="No live view.")
@click.option("--ablation", type=click.Choice(["last-context"]), help="Train only each trajectory's last context.")
def demo(
    seed: int,
    steps: int,
    run_dir: Path | None,
    actors: int,
    eval_questions: int,
    staleness: int,
    quiet: bool,
    ablation: str | None,
) -> None:
    """Show the whole system learn on this machine: real processes, real sockets, a reward that rises.

    A tiny model answers multi-hop questions about made-up worlds by searching and rewriting a one-fact memory. A
    scripted, noisy warm start teaches it the format; reinforcement learning makes it reliable: it sharpens noisy
    behaviour, it discovers no new skill. About four minutes on two cores.
    """
    import logging

    from protocol.role_startup import run_async

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    wanted = Wanted(seed, steps, actors, eval_questions, staleness, ablation or "none")
    folder = _claimed(run_dir, wanted) if run_dir is not None else _next_run_dir(wanted)
    options = Options(wanted, run_dir=folder.resolve(), quiet=quiet)
    try:
        run_async(_run(options))
    except KeyboardInterrupt:
        _say("demo: stopped; the same command goes on where it was")
        raise


async def _run(options: Options) -> None:
    import json

    from learner.launch.demo_report import finish, relative
    from learner.launch.plan import plan
    from learner.launch.stopwatch import Stopwatch
    from learner.launch.supervisor import Supervisor
    from learner.launch.view import show_while, view_of
    from protocol.config_file import save_config

    _say(f"demo: seed {options.wanted.seed}, {options.wanted.num_steps} steps, in {relative(options.run_dir)}")
    async with Supervisor(options.run_dir) as supervisor:
        (options.run_dir / _OPTIONS).write_text(json.dumps(asdict(options.wanted)) + "\n")
        clock = Stopwatch(options.run_dir / "seconds.json")
        with clock.lap("warm_start_s"):
            await _prepare(options, supervisor)
        config = _config(options)
        saved = options.run_dir / "config.json"
        save_config(config, saved)
        processes = plan(config, config_path=saved)
        await supervisor.start([spec for spec in processes if spec.role != "actor"])
        before = options.run_dir / "eval-before.json"
        with clock.lap("eval_s"):
            await _evaluate(options, supervisor, saved, before, version=0)
        with clock.lap("rl_s"):
            await supervisor.start([spec for spec in processes if spec.role == "actor"])
            view = view_of(config, supervisor.states, quiet=options.quiet)
            await show_while(view, supervisor.wait("learner"))
        after = options.run_dir / "eval-after.json"
        with clock.lap("eval_s"):
            await _evaluate(options, supervisor, saved, after, version=options.wanted.num_steps)
    report = finish(
        config,
        seed=options.wanted.seed,
        num_steps=options.wanted.num_steps,
        before=before,
        after=after,
        seconds=clock.seconds,
    )
    _say(report)


async def _prepare(options: Options, supervisor: Supervisor) -> None:
    """Corpora, tokenizer and demonstrations; then indexes and the warm start, side by side."""
    import asyncio

    data = options.data
    if not (data / "demonstrations.safetensors").is_file():
        worlds = [argument for world in options.worlds for argument in ("--world", str(world))]
        worlds += ["--eval-world", str(options.eval_world)]
        seed = str(options.wanted.seed)
        await _step(supervisor, "data", "actor.tasks.toy.command", "--out", str(data), "--seed", seed, *worlds)
    jobs = [_warm_start(options, supervisor)] if not options.model.is_dir() else []
    await asyncio.gather(_index(options, supervisor), *jobs)


async def _index(options: Options, supervisor: Supervisor) -> None:
    for world in options.all_worlds:
        out = options.data / "indexes" / f"world-{world}"
        if not out.is_dir():
            corpus = str(options.data / "corpora" / f"world-{world}.jsonl")
            await _step(supervisor, "index", "learner.launch", "index", corpus, "--out", str(out), "--encoder", "bow")


async def _warm_start(options: Options, supervisor: Supervisor) -> None:
    _say("demo: warm start (about a minute): copying, then scripted demonstrations that err on purpose …")
    arguments = ["--data", str(options.data), "--out", str(options.model), "--seed", str(options.wanted.seed)]
    await _step(supervisor, "warm-start", "learner.warmstart", *arguments)


async def _evaluate(options: Options, supervisor: Supervisor, config: Path, out: Path, *, version: int) -> None:
    """Sampled at T = 1 and greedy, side by side, on the unseen world, by the engine at `version`."""
    import asyncio
    import json

    if out.is_file():
        return
    _say(f"demo: evaluating version {version} on {options.wanted.num_eval_questions} questions of an unseen world …")
    parts = {"sampled": "1.0", "greedy": "0.0"}
    files = {name: out.with_name(f"{out.stem}-{name}.json") for name in parts}
    await asyncio.gather(
        *(
            _step(
                supervisor,
                f"{out.stem}-{name}",
                "learner.launch",
                "eval",
                str(config),
                *("--questions", str(options.wanted.num_eval_questions), "--temperature", temperature),
                *("--version", str(version), "--out", str(files[name])),
            )
            for name, temperature in parts.items()
        )
    )
    out.write_text(json.dumps({name: json.loads(file.read_text()) for name, file in files.items()}, indent=2) + "\n")
    for file in files.values():
        file.unlink()


async def _step(supervisor: Supervisor, name: str, module: str, *arguments: str) -> None:
    from learner.launch.plan import ProcessSpec

    await supervisor.run(ProcessSpec(name, "step", (sys.executable, "-m", module, *arguments)))


def _config(options: Options) -> Config:
    """The toy's recipe: learning rate, batch and schedule were found by a prototype (docs/log.md)."""
    from learner.launch.plan import with_ports
    from protocol.config_file import parse_config

    indexes = {f"world-{world}": str(options.data / "indexes" / f"world-{world}") for world in options.all_worlds}
    tree: dict[str, object] = {
        "run": {"name": f"demo-seed-{options.wanted.seed}", "dir": str(options.run_dir), "seed": options.wanted.seed},
        "model": {"path": str(options.model)},
        "task": {
            "kind": "toy",
            "worlds": list(options.worlds),
            "eval_worlds": [options.eval_world],
            "reward": "em",
        },
        "workflow": {
            "rendering": "toy",
            "max_turns": 5,
            "action_tokens": 16,
            "memory_tokens": 20,
            "context_tokens": 160,
            "top_n": 3,
        },
        "actor": {"count": options.wanted.num_actors, "max_trajectories": max(8, 128 // options.wanted.num_actors)},
        "engine": {"count": 1, "max_running_requests": 128},
        "retriever": {"indexes": indexes},
        "learner": {
            "num_steps": options.wanted.num_steps,
            "groups_per_batch": 16,
            "group_size": 8,
            "staleness_bound": options.wanted.staleness_bound,
            "tokens_per_micro_batch": 4096,
            "ablation": options.wanted.ablation,
            "advantage": {"eps": 1e-4},
            "loss": {"aggregation": "token"},
            "optimizer": {
                "learning_rate": 1e-3,
                "betas": [0.9, 0.99],
                "weight_decay": 0.0,
                "schedule": "linear",
                "warmup_steps": 5,
                "final_fraction": 0.1,
            },
            "checkpoint": {"every_steps": 20, "keep": 2},
        },
    }
    return with_ports(parse_config(tree, source="the demo's config"))


def _next_run_dir(wanted: Wanted) -> Path:
    """The first runs/demo-N that is free, or holds a demo with the same options that was stopped."""
    number = 1
    while (folder := Path("runs") / f"demo-{number}").exists() and not _is_resumable(folder, wanted):
        number += 1
    return folder


def _claimed(folder: Path, wanted: Wanted) -> Path:
    """Raises: DataError where `folder` holds a finished demo, or one with other options."""
    from protocol.errors import DataError

    if (folder / "report.json").is_file():
        raise DataError(f"--run-dir {folder} holds a finished demo: give another, or see its report.json")
    if (folder / _OPTIONS).is_file() and not _is_resumable(folder, wanted):
        raise DataError(f"--run-dir {folder} holds a demo with other options (see {_OPTIONS} there): give another")
    return folder


def _is_resumable(folder: Path, wanted: Wanted) -> bool:
    import json

    options = folder / _OPTIONS
    return (
        options.is_file()
        and not (folder / "report.json").is_file()
        and json.loads(options.read_text()) == asdict(wanted)
    )


def _say(text: str) -> None:
    click.echo(text)
