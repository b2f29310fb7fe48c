"""Samples a model's trajectories with the embedded engine, the retriever process and the real workflow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from actor.engine.server import EngineServer
from actor.engines.sampling import SamplingParams
from actor.evaluation.evaluate import run_episodes, run_evaluation
from actor.extensions import make_task
from learner.launch.process_plan import plan, with_ports
from learner.launch.supervisor import Supervisor
from protocol.config import Config
from protocol.evaluation import EvaluationFolder, EvaluationPlan
from protocol.types import Context, Status


@dataclass(frozen=True, slots=True)
class Measured:
    """share: the fraction of trajectories that completed with at least two contexts. endings: count by status."""

    share: float
    num_trajectories: int
    endings: dict[str, int]
    mean_f1: float
    mean_turns: float


@asynccontextmanager
async def serving(config: Config, *, folder: Path, threads: int) -> AsyncIterator[Config]:
    """Starts the engine in this process and a retriever process; yields the config with their addresses.

    Logs are written to `folder`.
    """
    config = with_ports(config)
    server = EngineServer(
        model_path=config.model.path,
        max_running_requests=config.engine.max_running_requests,
        max_total_tokens=config.engine.max_total_tokens,
        torch_threads=threads,
        seed=config.run.seed,
    )
    async with Supervisor(folder) as supervisor:
        processes = plan(config, config_path=folder / "unused.json")
        await supervisor.start([process for process in processes if process.role == "retriever"])
        await server.start()
        try:
            engine = config.engine.model_copy(update={"urls": (server.url,), "ports": ()})
            yield config.model_copy(update={"engine": engine})
        finally:
            await server.stop()


async def measure(config: Config, *, num_questions: int, folder: Path, threads: int) -> Measured:
    """Samples with the run's settings; writes samples.jsonl, report.json and logs to `folder`."""
    evaluation = EvaluationFolder(folder)
    async with serving(config, folder=folder, threads=threads) as served:
        measured = EvaluationPlan(
            engines=served.engine.urls,
            limit=num_questions,
            temperature=config.sampling.temperature,
            seed=config.run.seed,
            concurrency=config.engine.max_running_requests,
            transcripts=True,
        )
        await run_evaluation(served, measured, evaluation)
    return read_measured(evaluation.samples)


def is_measured(folder: Path) -> bool:
    """Whether `measure` has ended for `folder`."""
    evaluation = EvaluationFolder(folder)
    return evaluation.report.is_file() and evaluation.read_report().complete


async def well_formed_contexts(config: Config, *, folder: Path, threads: int) -> list[Context]:
    """Samples one trajectory per training question; returns the contexts of the well-formed ones.

    Logs are written to `folder`.
    """
    task = make_task(config, split="train")
    questions = [task.question(cursor) for cursor in range(task.num_questions or 0)]
    sampling = SamplingParams(temperature=config.sampling.temperature, seed=config.run.seed)
    async with serving(config, folder=folder, threads=threads) as served:
        limit, urls = served.engine.max_running_requests, served.engine.urls
        played = await run_episodes(served, questions, urls=urls, sampling=sampling, concurrency=limit, split="train")
    well_formed = [t for t, _ in played if t.status is Status.COMPLETED and len(t.contexts) >= 2]
    return [context for trajectory in well_formed for context in trajectory.contexts]


def read_measured(samples: Path) -> Measured:
    """Reads the samples.jsonl of an evaluation with transcripts."""
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    well_formed = [row["status"] == Status.COMPLETED and row["num_contexts"] >= 2 for row in rows]
    return Measured(
        share=sum(well_formed) / len(rows),
        num_trajectories=len(rows),
        endings=dict(Counter(row["status"] for row in rows)),
        mean_f1=sum(row["parts"].get("f1", 0.0) for row in rows) / len(rows),
        mean_turns=sum(row["num_contexts"] for row in rows) / len(rows),
    )
