"""The demo's stages that run as separate processes and end: data, indexes, warm start, evaluation.

Each stage writes its result into the demo's folder and is skipped if the result exists.
"""

from __future__ import annotations

import asyncio
import json
import sys

import click

from learner.launch.demo_run import DemoRun
from learner.launch.process_plan import ProcessSpec
from learner.launch.supervisor import Supervisor
from protocol.atomic_write import atomic_write


async def make_data_and_model(run: DemoRun, supervisor: Supervisor) -> None:
    """Makes corpora, tokenizer and demonstrations; then the indexes and the warm start concurrently."""
    if not (run.data / "demonstrations.safetensors").is_file():
        worlds = [argument for world in run.worlds for argument in ("--world", str(world))]
        worlds += ["--eval-world", str(run.eval_world)]
        seed = str(run.settings.seed)
        await _run_module(
            supervisor, "data", "actor.tasks.toy.command", "--out", str(run.data), "--seed", seed, *worlds
        )
    await asyncio.gather(_build_indexes(run, supervisor), _warm_start(run, supervisor))


async def evaluate(run: DemoRun, supervisor: Supervisor, *, when: str, version: int) -> None:
    """Evaluates policy `version` on the unseen world, sampled at T = 1 and greedy concurrently.

    Writes `run.evaluation(when)`.
    """
    out = run.evaluation(when)
    if out.is_file():
        return
    num_questions = str(run.settings.num_eval_questions)
    click.echo(f"demo: evaluating version {version} on {num_questions} questions about an unseen world …")
    temperatures = {"sampled": "1.0", "greedy": "0.0"}
    files = {name: out.with_name(f"{out.stem}-{name}.json") for name in temperatures}
    await asyncio.gather(
        *(
            _run_module(
                supervisor,
                f"{out.stem}-{name}",
                "learner.launch",
                *("eval", str(run.folder.config), "--questions", num_questions, "--temperature", temperature),
                *("--version", str(version), "--out", str(files[name])),
            )
            for name, temperature in temperatures.items()
        )
    )
    results = {name: json.loads(file.read_text()) for name, file in files.items()}
    atomic_write(out, json.dumps(results, indent=2) + "\n")
    for file in files.values():
        file.unlink()


async def _build_indexes(run: DemoRun, supervisor: Supervisor) -> None:
    for world in run.all_worlds:
        out, corpus = run.index(world), str(run.corpus(world))
        if not out.is_dir():
            await _run_module(
                supervisor, "index", "learner.launch", "index", corpus, "--out", str(out), "--encoder", "bow"
            )


async def _warm_start(run: DemoRun, supervisor: Supervisor) -> None:
    if run.model.is_dir():
        return
    click.echo(
        "demo: warm start (about a minute): supervised training on scripted, deliberately noisy demonstrations …"
    )
    arguments = ["--data", str(run.data), "--out", str(run.model), "--seed", str(run.settings.seed)]
    await _run_module(supervisor, "warm-start", "learner.warmstart", *arguments)


async def _run_module(supervisor: Supervisor, name: str, module: str, *arguments: str) -> None:
    """Runs `python -m module arguments` as the process `name` and waits for its end. Raises: UserError, RunFailed."""
    await supervisor.run(ProcessSpec(name, "step", (sys.executable, "-m", module, *arguments)))
