"""Trajectories of a model as `palimpsest eval` runs them: embedded engine, retriever service, real workflow."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from actor.engine.server import EngineServer
from actor.evaluation.evaluate import EvaluationPlan, run_evaluation
from learner.launch.plan import plan, with_ports
from learner.launch.supervisor import Supervisor
from protocol.config import Config


@dataclass(frozen=True, slots=True)
class Measured:
    """share: of the trajectories, those that completed in two contexts or more. `endings` counts how they ended."""

    share: float
    num_trajectories: int
    endings: dict[str, int]
    mean_f1: float
    mean_turns: float


async def measure(config: Config, *, num_questions: int, folder: Path, threads: int) -> Measured:
    """Samples at T = 1 on the first evaluation questions; FOLDER gets trajectories.jsonl, the summary and logs."""
    config = with_ports(config)
    trajectories = folder / "trajectories.jsonl"
    server = EngineServer(
        model_path=config.model.path,
        max_running_requests=config.engine.max_running_requests,
        max_total_tokens=config.engine.max_total_tokens,
        torch_threads=threads,
        seed=config.run.seed,
    )
    evaluation = EvaluationPlan(
        engines=(),
        num_questions=num_questions,
        temperature=1.0,
        concurrency=config.engine.max_running_requests,
        trajectories=trajectories,
    )
    async with Supervisor(folder) as supervisor:
        processes = plan(config, config_path=folder / "unused.json")
        await supervisor.start([process for process in processes if process.role == "retriever"])
        await server.start()
        try:
            config = config.model_copy(
                update={"engine": config.engine.model_copy(update={"urls": (server.url,), "ports": ()})}
            )
            summary = await run_evaluation(config, evaluation)
        finally:
            await server.stop()
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return read_measured(trajectories)


def read_measured(trajectories: Path) -> Measured:
    """From what `palimpsest eval --trajectories` wrote."""
    rows = [json.loads(line) for line in trajectories.read_text(encoding="utf-8").splitlines()]
    well_formed = [row["status"] == "completed" and len(row["contexts"]) >= 2 for row in rows]
    return Measured(
        share=sum(well_formed) / len(rows),
        num_trajectories=len(rows),
        endings=dict(Counter(row["status"] for row in rows)),
        mean_f1=sum(row["parts"]["f1"] for row in rows) / len(rows),
        mean_turns=sum(len(row["contexts"]) for row in rows) / len(rows),
    )
