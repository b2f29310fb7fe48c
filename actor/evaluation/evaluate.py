"""Runs the workflow on a task's questions and measures rewards and token counts.

    samples.jsonl ─► what is missing ─► `concurrency` workers: question ─► episode ─► append the line ─► tally
                                                                                        │ every second
                                                             report.json, fsync ◄───────┘

    task      consumes                      produces               waits for
    workers   the next missing sample       a line, a sum          engines, tools, the reward
    keeper    the lines, the sums           fsync, report.json     1 s

A trajectory is not kept after its line is written. Started again, an evaluation runs the samples that are missing and
those that FAILED.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

from actor.build import Parts, open_parts
from actor.engines.pool import EngineInfo
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.evaluation.engines import EvaluatedEngines
from actor.evaluation.identity import check_identity, evaluation_identity
from actor.evaluation.samples import Sample, SampleFile, failed_sample, sample_of
from actor.evaluation.tally import Tally
from actor.extensions import make_task
from actor.tasks.task import Split
from actor.tools.search_client import SearchClient, SearchFailed
from protocol.addresses import tcp_address
from protocol.config import Config
from protocol.config_file import require_ports
from protocol.errors import DataError, UnreachableError
from protocol.evaluation import EvaluationFolder, EvaluationPlan, EvaluationReport
from protocol.extensions import described
from protocol.step_progress import StepProgress
from protocol.types import Question, Trajectory

log = logging.getLogger(__name__)

T = TypeVar("T")

_UNLIMITED_TASK_QUESTIONS = 512
_REPORT_EVERY_S = 1.0


async def run_evaluation(
    config: Config, plan: EvaluationPlan, folder: EvaluationFolder, *, lock_wait_s: float = 5.0
) -> EvaluationReport:
    """Takes the missing samples of the evaluation in `folder`; returns its report, which is also written there.

    `lock_wait_s`: longest wait for another evaluator in `folder` to end.

    Raises: UserError (another evaluation in the folder, no port of the retriever, a server that does not respond,
    several weight versions, a full disk, task files, extensions). Samples taken so far are in the folder then.
    """
    if config.retriever.indexes:
        require_ports(config, "retriever.port")
    folder.root.mkdir(parents=True, exist_ok=True)
    async with SampleFile(folder.samples, lock_wait_s=lock_wait_s) as samples:
        check_identity(folder.identity, evaluation_identity(config, plan))
        task = make_task(config, split=plan.split)
        limit = plan.limit or task.num_questions or _UNLIMITED_TASK_QUESTIONS
        num_questions = min(limit, task.num_questions or limit)
        evaluation = _Evaluation(plan, folder, samples, num_questions=num_questions)
        evaluation.read_samples()
        if evaluation.num_missing:
            await _run_missing(config, evaluation)
        return evaluation.write_report(complete=True)


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
    results: dict[int, tuple[Trajectory, Episode]] = {}
    async with AsyncExitStack() as stack:
        parts = await _open(config, stack, split=split, sampling=sampling, urls=urls, concurrency=concurrency)

        async def run(cursor: int) -> None:
            question = questions[cursor]
            results[cursor] = await parts.episodes.run(question, rid=question.id)

        await _for_each(range(len(questions)), run, concurrency=concurrency)
    return [results[cursor] for cursor in range(len(questions))]


class _Evaluation:
    """The samples of one evaluation: which are done, their sums, their file."""

    def __init__(
        self, plan: EvaluationPlan, folder: EvaluationFolder, samples: SampleFile, *, num_questions: int
    ) -> None:
        self.plan = plan
        self.tally = Tally(plan, num_questions=num_questions)
        self._folder = folder
        self._samples = samples
        self._num_questions = num_questions
        self._done = bytearray(num_questions * plan.samples)

    @property
    def num_missing(self) -> int:
        return len(self._done) - self.tally.num_done

    def read_samples(self) -> None:
        """Reads the samples of an earlier call. Lines of FAILED ones are removed; they are run again."""
        self._samples.drop_failed()
        for sample in self._samples.read():
            key = self._key(sample.cursor, sample.sample)
            if sample.cursor < self._num_questions and not self._done[key]:
                self._done[key] = True
                self.tally.add(sample)

    def missing(self) -> Iterator[tuple[int, int]]:
        """(cursor, sample) of the samples that were missing at the start, those of one question next to each other."""
        for key, is_done in enumerate(self._done):
            if not is_done:
                yield divmod(key, self.plan.samples)

    def check_versions(self, versions: frozenset[str]) -> None:
        """Raises: DataError if samples of `versions` would be mixed with those of other versions."""
        if len(every := sorted(versions | self.tally.versions)) > 1 and not self.plan.mixed_versions:
            raise DataError(
                f"{self._folder.root}: the samples would be of several weight versions, {', '.join(every)}; evaluate "
                "a checkpoint, choose another --output, or accept them with --mixed-versions"
            )

    def record(self, sample: Sample) -> None:
        """Appends a line. Raises: DataError (the disk is full; another weight version)."""
        self.check_versions(frozenset(sample.versions))
        self._samples.append(sample)
        self._done[self._key(sample.cursor, sample.sample)] = True
        self.tally.add(sample)

    async def keep(self) -> None:
        """Writes the lines to the disk and the report so far, every second."""
        while True:
            self.write_report(complete=False)
            print(StepProgress(self.tally.num_done, len(self._done), "samples"), flush=True)
            await asyncio.sleep(_REPORT_EVERY_S)
            await asyncio.to_thread(self._samples.sync)

    def write_report(self, *, complete: bool) -> EvaluationReport:
        """Raises: DataError."""
        if complete:
            self._samples.sync()
        report = self.tally.report(complete=complete)
        try:
            self._folder.write_report(report)
        except OSError as error:
            raise DataError(f"{self._folder.report} cannot be written: {error.strerror}") from error
        return report

    def _key(self, cursor: int, sample: int) -> int:
        return cursor * self.plan.samples + sample


async def _run_missing(config: Config, evaluation: _Evaluation) -> None:
    plan = evaluation.plan
    engines = EvaluatedEngines(
        plan.engines, api_key=config.network.api_key(), wait_s=plan.wait_s, lost_after_s=plan.lost_after_s
    )
    evaluation.check_versions(await engines.served_versions(wanted=plan.version))
    sampling = SamplingParams(temperature=plan.temperature, seed=plan.seed, allow_truncation=True)
    async with AsyncExitStack() as stack:
        parts = await _open(
            config, stack, split=plan.split, sampling=sampling, urls=plan.engines, concurrency=plan.concurrency
        )

        async def run(key: tuple[int, int]) -> None:
            sample = await _run_sample(parts, *key, transcripts=plan.transcripts)
            if sample.is_failed:
                await engines.check_any_responds()
            evaluation.record(sample)

        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(evaluation.keep())
            await _for_each(evaluation.missing(), run, concurrency=plan.concurrency)
            keeper.cancel()


async def _run_sample(parts: Parts, cursor: int, sample: int, *, transcripts: bool) -> Sample:
    """Runs one episode. An exception of user code gives a FAILED sample with its reason."""
    question = Question(f"question {cursor}", "", ())
    try:
        question = parts.task.question(cursor)
        trajectory, episode = await parts.episodes.run(question, rid=f"{question.id}/{sample}")
        return sample_of(question, trajectory, episode, cursor=cursor, sample=sample, transcripts=transcripts)
    except Exception as error:
        log.exception("sample %d of question %d failed", sample, cursor)
        return failed_sample(question, described(error), cursor=cursor, sample=sample)


async def _open(
    config: Config,
    stack: AsyncExitStack,
    *,
    split: Split,
    sampling: SamplingParams,
    urls: Sequence[str],
    concurrency: int,
) -> Parts:
    """Opens what runs episodes, and checks that the retriever responds. Raises: UserError."""
    parts = await open_parts(config, stack, split=split, sampling=sampling, run_id=None, max_trajectories=concurrency)
    parts.pool.set_engines([EngineInfo(url=url, version=0) for url in urls])
    if config.retriever.port:
        address = tcp_address(host=config.network.host, port=config.retriever.port)
        await _check_retriever(parts, address, timeout_s=config.actor.search_timeout_s)
    return parts


async def _check_retriever(parts: Parts, address: str, *, timeout_s: float) -> None:
    """Raises: UnreachableError if the retriever does not answer a search."""
    async with SearchClient(transport=parts.transport, address=address, timeout_s=timeout_s) as client:
        try:
            await client.search(["test"], top_n=1)
        except SearchFailed as error:
            raise UnreachableError(
                f"the retriever at {address} does not answer: {error}; start it, or correct retriever.port"
            ) from error


async def _for_each(items: Iterable[T], run: Callable[[T], Awaitable[None]], *, concurrency: int) -> None:
    """Calls `run` for every item, at most `concurrency` at once, and creates at most `concurrency` tasks."""
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            await run(item)

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(worker())
