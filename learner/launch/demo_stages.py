"""The demo's stages that run as separate processes and end: data, indexes, warm start, evaluation.

Each stage writes its result into the demo's folder and is skipped if the result exists.
"""

from __future__ import annotations

import asyncio
import sys

import click

from learner.launch.demo_run import DemoRun
from learner.launch.live_view import LiveView
from learner.launch.process_plan import ProcessSpec, evaluator
from learner.launch.supervisor import RunFailed, Supervisor
from protocol.config import Config
from protocol.config_file import save_config
from protocol.evaluation import EvaluationFolder, EvaluationPlan
from protocol.failure_counts import failure_line

TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
# For slow machines: if the learner or the engine cannot start, the supervisor ends the demo long before.
_ENGINE_TIMEOUT_S = 600.0


async def make_data_and_model(run: DemoRun, supervisor: Supervisor, view: LiveView) -> None:
    """Makes corpora, tokenizer and demonstrations; then the indexes and the warm start concurrently."""
    view.phase = "making worlds and demonstrations"
    if not (run.data / "demonstrations.safetensors").is_file():
        worlds = [argument for world in run.worlds for argument in ("--world", str(world))]
        worlds += ["--eval-world", str(run.eval_world)]
        seed = str(run.settings.seed)
        await _run_module(
            supervisor, "data", "actor.tasks.toy.command", "--out", str(run.data), "--seed", seed, *worlds
        )
    view.phase = "warm start: supervised training on scripted, noisy demonstrations"
    await asyncio.gather(_build_indexes(run, supervisor), _warm_start(run, supervisor))


async def evaluate(
    run: DemoRun, config: Config, supervisor: Supervisor, view: LiveView, *, when: str, version: int
) -> None:
    """Evaluates policy `version` on the unseen world, on the run's engine, sampled at T = 1 and greedy concurrently.

    Raises: RunFailed if every sample failed.
    """
    plans = {
        run.evaluation(when, how): EvaluationPlan(
            engines=tuple(f"http://{config.network.host}:{port}" for port in config.engine.ports),
            policy=f"{config.run.name} step {version}",
            limit=run.settings.num_eval_questions,
            temperature=temperature,
            seed=run.settings.seed,
            version=version,
            wait_s=_ENGINE_TIMEOUT_S,
        )
        for how, temperature in TEMPERATURES.items()
    }
    missing = [folder for folder in plans if not _is_complete(folder)]
    if not missing:
        return
    num_questions = run.settings.num_eval_questions
    view.phase = f"evaluating version {version} on {num_questions} questions about an unseen world"
    for folder in missing:
        folder.write_plan(plans[folder])
        save_config(config, folder.config)
    await asyncio.gather(
        *(supervisor.run(evaluator(folder.root, name=f"eval-{folder.root.name}")) for folder in missing)
    )
    for folder in missing:
        report = folder.read_report()
        if report.num_failed:
            click.echo(f"demo: evaluation {folder.root.name}: {failure_line(report.failures)}")
        if report.reward is None:
            raise RunFailed(f"evaluation {folder.root.name}: no sample is valid; see {folder.samples}")


def _is_complete(folder: EvaluationFolder) -> bool:
    if not folder.report.is_file():
        return False
    report = folder.read_report()
    return report.complete and report.reward is not None


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
    arguments = ["--data", str(run.data), "--out", str(run.model), "--seed", str(run.settings.seed)]
    await _run_module(supervisor, "warm-start", "learner.warmstart", *arguments)


async def _run_module(supervisor: Supervisor, name: str, module: str, *arguments: str) -> None:
    """Runs `python -m module arguments` as the process `name` and waits for its end. Raises: UserError, RunFailed."""
    await supervisor.run(ProcessSpec(name, "step", (sys.executable, "-m", module, *arguments)))
