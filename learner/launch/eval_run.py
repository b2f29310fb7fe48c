"""Evaluates a policy of a run: chooses it, starts what it needs, waits for the evaluator, stops everything.

    RUN ─► policy: a checkpoint │ the run's engines │ given engines
             │
             ▼
    RUN/evaluations/NAME: config.json, plan.json ─► [retriever] [engine] ─► evaluator ─► samples.jsonl, report.json

Every process is a child of the supervisor, which stops them on success, failure and Ctrl-C.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from learner.launch.command_line import relative
from learner.launch.engine_token import with_engine_token
from learner.launch.eval_policy import EvaluatedPolicy, choose_checkpoint, linked_model
from learner.launch.eval_progress import show_progress
from learner.launch.process_plan import evaluation_services, evaluator, with_ports
from learner.launch.supervisor import Supervisor
from learner.store.folder_lock import is_locked
from learner.store.run_folder import RunFolder
from protocol.config import Config
from protocol.config_file import load_config, save_config
from protocol.errors import ConfigError, DataError
from protocol.evaluation import EvaluationFolder, EvaluationPlan, EvaluationReport

# An engine that loads a large model, or a retriever that loads a large index, takes minutes.
_START_TIMEOUT_S = 900.0
# Engines that are not started here: they are lost if none responds for so long.
_LOST_AFTER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of `palimpsest eval`. At most one of `checkpoint`, `live` and `engines` is given."""

    run: Path
    overrides: tuple[str, ...] = ()
    checkpoint: int | None = None
    live: bool = False
    engines: tuple[str, ...] = ()
    output: Path | None = None
    overwrite: bool = False
    split: Literal["eval", "train"] = "eval"
    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int | None = None
    concurrency: int = 128
    transcripts: bool = False
    mixed_versions: bool = False


async def evaluate_run(request: Request) -> tuple[EvaluationReport, EvaluationFolder]:
    """Returns the report of the complete evaluation. Raises: UserError, RunFailed."""
    config, root = _config_and_folder(request)
    policy = _policy(request, config, root)
    folder = EvaluationFolder((request.output or root / "evaluations" / _name(request, policy)).resolve())
    async with Supervisor(folder.root) as supervisor:
        if request.overwrite:
            for path in (folder.samples, folder.identity, folder.report):
                path.unlink(missing_ok=True)
        config = _prepared(config, policy, folder, live=request.live)
        seed = config.run.seed if request.seed is None else request.seed
        plan = EvaluationPlan(
            engines=policy.engines or (f"http://127.0.0.1:{config.engine.ports[0]}",),
            policy=policy.name,
            split=request.split,
            limit=request.limit,
            samples=request.samples,
            temperature=request.temperature,
            seed=seed,
            concurrency=request.concurrency,
            wait_s=_START_TIMEOUT_S if policy.model else 0.0,
            lost_after_s=_START_TIMEOUT_S if policy.model else _LOST_AFTER_S,
            transcripts=request.transcripts,
            mixed_versions=request.mixed_versions,
        )
        folder.write_plan(plan)
        save_config(config, folder.config)
        for warning in policy.warnings:
            click.echo(f"eval: skipped: {warning}", err=True)
        click.echo(f"eval: {policy.text}; results in {relative(folder.root)}", err=True)
        if not request.live:
            weight_version = policy.weight_version if policy.model else None
            await supervisor.start(
                evaluation_services(config, config_path=folder.config, weight_version=weight_version)
            )
        await show_progress(folder, supervisor.run(evaluator(folder.root)))
    shutil.rmtree(folder.model, ignore_errors=True)
    folder.engine_token.unlink(missing_ok=True)
    return folder.read_report(), folder


def _config_and_folder(request: Request) -> tuple[Config, Path]:
    """The config of the run and the run's folder, which may have been moved since the run. Raises: UserError."""
    if request.run.is_file():
        config = load_config(request.run, request.overrides)
        return config, config.run.dir
    path = RunFolder(request.run).config
    if not path.is_file():
        raise DataError(f"{request.run} is not the folder of a run: it has no {path.name}")
    return load_config(path, request.overrides), request.run.resolve()


def _policy(request: Request, config: Config, root: Path) -> EvaluatedPolicy:
    """Raises: UserError."""
    if request.engines:
        return EvaluatedPolicy(engines=request.engines, text=f"evaluating what {', '.join(request.engines)} serves")
    if not request.live:
        return choose_checkpoint(config, root, request.checkpoint, is_run=request.run.is_dir())
    folder = RunFolder(root)
    if not is_locked(folder.launcher_lock) and not is_locked(folder.learner_lock):
        raise DataError(f"{root} does not run now: without --live, its newest checkpoint is evaluated")
    host = f"[{config.network.host}]" if ":" in config.network.host else config.network.host
    engines = (*(f"http://{host}:{port}" for port in config.engine.ports), *config.engine.urls)
    if not engines:
        raise ConfigError("--live: the run's config.json has no engine.ports and no engine.urls; give --engine URL")
    return EvaluatedPolicy(engines=engines, text=f"evaluating what the engines of {config.run.name} serve now")


def _name(request: Request, policy: EvaluatedPolicy) -> str:
    """The evaluation's folder: different settings have different ones, so the same command finds its samples."""
    what = f"step-{policy.step}" if policy.model else "live" if request.live else "engine"
    how = "greedy" if request.temperature == 0 else f"t{request.temperature:g}"
    parts = [what, request.split, how]
    parts += [f"x{request.samples}"] if request.samples > 1 else []
    parts += [f"seed{request.seed}"] if request.seed is not None else []
    return "-".join(parts)


def _prepared(config: Config, policy: EvaluatedPolicy, folder: EvaluationFolder, *, live: bool) -> Config:
    """The config of the evaluation's processes, with free ports for those that are started here. Raises: UserError.

    They listen on loopback; each engine gets its own token. A retriever is started if the run has indexes, except
    with `live`.
    """
    network, engine, retriever = config.network, config.engine, config.retriever
    model = config.model
    starts_retriever = bool(retriever.indexes) and not live
    if policy.model or starts_retriever:
        network = network.model_copy(update={"host": "127.0.0.1", "keys": None})
        retriever = retriever.model_copy(update={"port": 0 if starts_retriever else retriever.port})
    if policy.model:
        network = network.model_copy(update={"api_key_file": None})
        engine = engine.model_copy(update={"count": 1, "ports": (), "urls": ()})
        model = model.model_copy(update={"path": linked_model(policy, folder.model)})
    run = config.run.model_copy(update={"dir": folder.root})
    updated = config.model_copy(
        update={"run": run, "network": network, "engine": engine, "retriever": retriever, "model": model}
    )
    if policy.model:
        updated = with_engine_token(updated, folder.engine_token)
    return with_ports(updated) if policy.model or starts_retriever else updated
