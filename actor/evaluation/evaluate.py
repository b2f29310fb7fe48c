"""Runs the workflow on a task's evaluation questions, and measures accuracy and cost in tokens."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actor.build import open_parts
from actor.engines.pool import EngineInfo
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient
from actor.episode import Episode
from actor.extensions import make_task
from actor.tasks.task import Split
from protocol.config import Config
from protocol.errors import ConfigError, DataError, EngineError, EngineUnavailable, UnknownVersion, UnreachableError
from protocol.types import PolicyTag, Question, Status, Trajectory

_WAIT_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """`engines`: URLs; empty: those of the config. `temperature` 0 is greedy. `version`: wait until it is served.

    The summary is written to `out` as JSON, trajectories to `trajectories` as JSONL.
    """

    engines: tuple[str, ...]
    num_questions: int
    temperature: float
    concurrency: int
    version: int | None = None
    out: Path | None = None
    trajectories: Path | None = None


async def run_evaluation(config: Config, plan: EvaluationPlan) -> dict[str, float | int | str]:
    """Evaluates and returns the summary; writes the plan's files.

    Raises: UserError (unwritable files, no engine, an engine that does not respond, task files, extensions).
    """
    for path in (plan.out, plan.trajectories):
        if path is not None:
            _check_writable(path)
    task = make_task(config, split="eval")
    urls = plan.engines or (
        *(f"http://{config.network.host}:{port}" for port in config.engine.ports),
        *config.engine.urls,
    )
    if not urls:
        raise ConfigError("no engine to evaluate: give --engine URL, or engine.ports or engine.urls in the config")
    version = await _served_version(urls, api_key=config.network.api_key(), wanted=plan.version)
    num_questions = min(plan.num_questions, task.num_questions or plan.num_questions)
    questions = [task.question(cursor) for cursor in range(num_questions)]
    sampling = SamplingParams(temperature=plan.temperature, seed=config.run.seed, allow_truncation=True)
    started = time.perf_counter()
    results = await run_episodes(config, questions, urls=urls, sampling=sampling, concurrency=plan.concurrency)
    if plan.trajectories is not None:
        _save(plan.trajectories, "".join(_lines(questions, results)))
    summary = summarise([trajectory for trajectory, _ in results])
    report = {
        "weight_version": version,
        "temperature": plan.temperature,
        **summary,
        "wall_s": time.perf_counter() - started,
    }
    if plan.out is not None:
        _save(plan.out, json.dumps(report, indent=2) + "\n")
    return report


async def run_episodes(
    config: Config,
    questions: Sequence[Question],
    *,
    urls: Sequence[str],
    sampling: SamplingParams,
    concurrency: int,
    split: Split = "eval",
) -> list[tuple[Trajectory, Episode]]:
    """Runs one episode per question on the engines at `urls`; keeps the questions' order. Raises: UserError."""
    async with AsyncExitStack() as stack:
        parts = await open_parts(
            config, stack, split=split, sampling=sampling, run_id=None, max_trajectories=concurrency
        )
        parts.pool.set_engines([EngineInfo(url=url, version=0) for url in urls])
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(parts.episodes.run(question, rid=question.id)) for question in questions]
        return [each.result() for each in running]


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float | int]:
    """Returns means over the trajectories that did not fail, and the number of failed ones."""
    counted = [t for t in trajectories if t.status is not Status.FAILED]
    names = sorted({name for t in counted for name in t.reward_parts})
    stats = sorted({name for t in counted for name in t.stats})
    return {
        "num_questions": len(counted),
        "num_failed": len(trajectories) - len(counted),
        "reward": _mean([t.reward for t in counted]),
        **{name: _mean([t.reward_parts.get(name, 0.0) for t in counted]) for name in names},
        "answered": _mean([float(t.status is Status.COMPLETED) for t in counted]),
        "peak_context_tokens": _mean([float(max(map(len, t.contexts), default=0)) for t in counted]),
        **{f"mean_{name}": _mean([t.stats.get(name, 0.0) for t in counted]) for name in stats},
    }


async def _served_version(urls: Sequence[str], *, api_key: str | None, wanted: int | None) -> str:
    """Returns the weight versions that the engines serve. If `wanted` is given, waits until each engine serves it.

    Raises: UnreachableError.
    """
    served = set()
    for url in urls:
        async with SGLangClient(url, api_key=api_key) as client:
            try:
                async with asyncio.timeout(_WAIT_S if wanted is not None else None):
                    served.add(await _version_of(client, wanted))
            except (EngineError, TimeoutError) as error:
                what = (
                    f"does not serve version {wanted} after {_WAIT_S:g} s" if wanted is not None else "does not respond"
                )
                raise UnreachableError(f"engine {url} {what}: {error}; start it, or correct --engine") from error
    return ", ".join(sorted(served))


async def _version_of(client: SGLangClient, wanted: int | None) -> str:
    while True:
        try:
            text = (await client.model_info()).weight_version or "default"
            if wanted is None or PolicyTag.parse(text).version == wanted:
                return text
        except UnknownVersion:
            pass
        except EngineUnavailable:
            if wanted is None:
                raise
        await asyncio.sleep(_POLL_S)


def _check_writable(path: Path) -> None:
    """Checks that a file can be written, before the evaluation runs. Raises: DataError."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DataError(f"{path} cannot be written: its folder must exist and the file must not be protected")


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error


def _lines(questions: Sequence[Question], results: Sequence[tuple[Trajectory, Episode]]) -> Iterator[str]:
    for question, (trajectory, episode) in zip(questions, results, strict=True):
        line = {
            "id": question.id,
            "question": question.text,
            "answers": question.answers,
            "answer": episode.answer,
            "status": episode.status.value,
            "reason": episode.reason,
            "reward": trajectory.reward,
            "parts": trajectory.reward_parts,
            "stats": trajectory.stats,
            "memories": episode.memories,
            "contexts": episode.transcripts,
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
