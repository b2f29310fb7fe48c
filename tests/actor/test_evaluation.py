"""The evaluator: lines on disk, resuming, failures, weight versions, bounded memory. Servers are real sockets."""

from __future__ import annotations

import asyncio
import json
import math
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actor.evaluation.evaluate import run_evaluation
from actor.tasks.toy.tokenizer import write_tokenizer
from protocol.config import Config
from protocol.config_file import parse_config
from protocol.errors import ConfigError, DataError, UnreachableError, UserError
from protocol.evaluation import EvaluationFolder, EvaluationPlan, EvaluationReport

PARTS = "tests.actor.evaluation_parts"
WAIT_S = 20.0

Sections = dict[str, dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> EvaluationFolder:
    return EvaluationFolder(tmp_path / "evaluation")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """Makes a config of a toy tokenizer and `sections`."""
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 98}')

    def make(**sections: dict[str, Any]) -> Config:
        tree: dict[str, object] = {"model": {"path": str(tmp_path / "model")}, **sections}
        return parse_config(tree, source="test")

    return make


@pytest.fixture
def toy(make_config: Callable[..., Config], retriever) -> Config:
    """The toy task and the MemSearcher workflow, with the scripted retriever."""
    return make_config(
        task={"use": "toy", "worlds": [1], "eval_worlds": [1]},
        workflow={"rendering": "toy", "context_tokens": 100, "action_tokens": 8, "memory_tokens": 8},
        retriever={"port": int(retriever.router.address.rpartition(":")[2])},
        actor={"search_timeout_s": 0.5},
    )


def instant(make_config: Callable[..., Config], **sections: dict[str, Any]) -> Config:
    """Numbered questions that are answered without an engine."""
    uses = {"task": f"{PARTS}:Numbered", "workflow": f"{PARTS}:Instant", "reward": f"{PARTS}:Parity"}
    return make_config(**{key: {"use": use, **sections.get(key, {})} for key, use in uses.items()})


def plan(engine, **fields: Any) -> EvaluationPlan:
    return EvaluationPlan(engines=(engine.url,), **{"limit": 1, "lost_after_s": 0.0, **fields})


def lines(folder: EvaluationFolder) -> list[dict[str, Any]]:
    text = folder.samples.read_text(encoding="utf-8") if folder.samples.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


async def until(condition: Callable[[], bool], task: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            assert not task.done(), task.result()
            await asyncio.sleep(0.005)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_a_sample_has_its_answer_versions_and_counts(toy: Config, engine, toy_tokenizer, folder) -> None:
    answer = toy_tokenizer.encode("zuka ? <answer> pelu <end>")
    engine.reply(answer, spans=[("run:1:0", 0, 3), ("run:2:1", 3, len(answer))])
    report = await run_evaluation(toy, plan(engine, transcripts=True, mixed_versions=True), folder)
    (line,) = lines(folder)
    assert (line["id"], line["answer"], line["status"]) == ("world-1/0", "pelu", "completed")
    assert line["versions"] == ["run:1:0", "run:2:1"]
    assert (line["num_contexts"], line["num_tokens"]) == (1, line["stats"]["num_prompt_tokens"] + len(answer))
    assert line["contexts"][0].endswith("zuka ? <answer> pelu <end>")
    assert report.versions == {"run:1:0": 1, "run:2:1": 1}
    assert (report.complete, report.num_done, report.num_failed) == (True, 1, 0)
    assert folder.read_report() == report


async def test_a_finished_sample_is_on_disk_while_others_run_and_is_not_repeated(
    toy: Config, engine, toy_tokenizer, folder
) -> None:
    engine.reply(toy_tokenizer.encode("zuka ? <answer> pelu <end>"))
    engine.hang_once()
    running = asyncio.create_task(run_evaluation(toy, plan(engine, limit=2), folder))
    await until(lambda: len(lines(folder)) == 1 and engine.hanging.is_set(), running)
    (first,) = lines(folder)
    await cancelled(running)
    with folder.samples.open("ab") as file:
        file.write(b'{"cursor": 1, "sample": 0, "id": "half-writ')
    engine.requests.clear()
    engine.reply(toy_tokenizer.encode("zuka ? <answer> kami <end>"))
    report = await run_evaluation(toy, plan(engine, limit=2), folder)
    assert len(engine.requests) == 1, "only the missing sample was asked for"
    kept, added = lines(folder)
    assert kept == first
    assert {kept["cursor"], added["cursor"]} == {0, 1}
    assert (report.complete, report.num_done) == (True, 2)
    assert await run_evaluation(toy, plan(engine, limit=2), folder) == report, "nothing is missing"
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("fields", "sections", "key"),
    [
        ({"temperature": 1.0}, {}, "evaluation.temperature: it has 0.0, this one has 1.0"),
        ({"seed": 7}, {}, "evaluation.seed"),
        ({"samples": 2}, {}, "evaluation.samples"),
        ({"policy": "run step 4"}, {}, "evaluation.policy"),
        ({}, {"workflow": {"answer": "0"}}, 'workflow.answer: it has no value, this one has "0"'),
        ({}, {"task": {"num": 9}}, "task.num"),
    ],
)
async def test_samples_of_another_evaluation_are_not_added_to(
    make_config, engine, folder, fields: dict[str, Any], sections: Sections, key: str
) -> None:
    base: Sections = {"task": {"num": 3}}
    await run_evaluation(instant(make_config, **base), plan(engine, limit=None), folder)
    before = folder.samples.read_bytes()
    with pytest.raises(ConfigError, match="contains another evaluation") as refused:
        await run_evaluation(instant(make_config, **(base | sections)), plan(engine, limit=None, **fields), folder)
    assert key in str(refused.value)
    assert folder.samples.read_bytes() == before


async def test_questions_may_be_added_to_an_evaluation(make_config, engine, folder) -> None:
    config = instant(make_config, task={"num": 8})
    await run_evaluation(config, plan(engine, limit=2), folder)
    report = await run_evaluation(config, plan(engine, limit=4), folder)
    assert (report.num_questions, report.num_done) == (4, 4)
    assert report.reward is not None
    assert (report.reward.mean, report.reward.stderr) == (0.5, pytest.approx(math.sqrt(1 / 3 / 4)))
    fewer = await run_evaluation(config, plan(engine, limit=1), folder)
    assert fewer.reward is not None
    assert (fewer.num_done, fewer.reward.mean, fewer.reward.stderr) == (1, 0.0, None)


async def test_failed_samples_have_reasons_are_in_no_mean_and_are_repeated(make_config, engine, folder) -> None:
    task = {"num": 6, "broken": [0]}
    config = instant(make_config, task=task, workflow={"failing": ["2", "3"]})
    report = await run_evaluation(config, plan(engine, limit=None), folder)
    assert report.reward is not None
    assert (report.num_done, report.num_failed, report.reward.num_questions) == (6, 4, 2)
    assert report.reward.mean == 1.0, "questions 1 and 5 are answered with 1, which is right"
    assert report.parts["em"].mean == 1.0
    failed = {line["cursor"]: line for line in lines(folder) if line["status"] == "failed"}
    assert {line["reward"] for line in failed.values()} == {None}
    assert "LookupError: there is no question 0" in failed[0]["reason"]
    assert "ZeroDivisionError: no score for 4" in failed[4]["reason"]
    assert report.failures["no passage for question 2"] == 2, "reasons that differ in a number are counted together"
    assert sum(report.failures.values()) == 4
    again = await run_evaluation(config, plan(engine, limit=None), folder)
    assert (again.num_done, again.num_failed, len(lines(folder))) == (6, 4, 6)


async def test_without_a_valid_sample_the_reward_is_none_and_not_0(toy: Config, engine, retriever, folder) -> None:
    engine.fail(400, "input_ids is too long")
    report = await run_evaluation(toy, plan(engine), folder)
    assert report.reward is None
    assert report.parts == {}
    assert json.loads(folder.report.read_text())["reward"] is None
    ((reason, count),) = report.failures.items()
    assert (count, "input_ids is too long" in reason) == (1, True)


@pytest.mark.parametrize("value", [math.nan, math.inf, "many", None, [1]])
async def test_values_that_json_cannot_hold_fail_their_sample_only(make_config, engine, folder, value: object) -> None:
    config = instant(make_config, task={"num": 1}, workflow={"stats": {"num_notes": value}})
    report = await run_evaluation(config, plan(engine), folder)
    assert (report.num_done, report.num_failed) == (1, 1)
    assert len(lines(folder)) == 1


async def test_text_that_utf8_cannot_encode_is_escaped(make_config, engine, folder) -> None:
    config = instant(make_config, task={"num": 1}, workflow={"answer": "\ud800é"})
    await run_evaluation(config, plan(engine), folder)
    assert [line["answer"] for line in lines(folder)] == ["\\ud800é"]


async def test_samples_of_several_versions_are_refused(toy: Config, engine, toy_tokenizer, folder) -> None:
    answer = toy_tokenizer.encode("zuka ? <answer> pelu <end>")
    engine.reply(answer)
    await run_evaluation(toy, plan(engine), folder)
    engine.reply(answer, spans=[("run:2:1", 0, len(answer))])
    with pytest.raises(BaseExceptionGroup) as changed:
        await run_evaluation(toy, plan(engine, limit=2), folder)
    assert changed.group_contains(DataError, match="several weight versions, run:1:0, run:2:1", depth=2)
    assert len(lines(folder)) == 1
    engine.weight_version = "run:2:1"
    with pytest.raises(DataError, match="several weight versions"):
        await run_evaluation(toy, plan(engine, limit=2), folder)
    engine.reply(answer)
    report = await run_evaluation(toy, plan(engine, limit=2, mixed_versions=True), folder)
    assert report.versions == {"run:1:0": 1, "run:2:1": 1}


async def test_a_missing_or_silent_retriever_is_reported_before_any_request(
    make_config, toy: Config, engine, retriever, folder
) -> None:
    unset = toy.retriever.model_copy(update={"port": 0, "indexes": {"world-1": folder.root}})
    with pytest.raises(ConfigError, match=r"retriever\.port is 0"):
        await run_evaluation(toy.model_copy(update={"retriever": unset}), plan(engine), folder)
    retriever.silent = True
    with pytest.raises(UnreachableError, match=r"the retriever at tcp://.* does not answer: .*retriever\.port"):
        await run_evaluation(toy, plan(engine), folder)
    assert not engine.requests
    assert lines(folder) == []


async def test_an_engine_that_is_gone_ends_the_evaluation_and_keeps_its_samples(
    toy: Config, start_engine: Callable[[], Awaitable[Any]], toy_tokenizer, folder
) -> None:
    """The run whose engines are asked ends in the middle: its engine refuses, then does not respond."""
    engine = await start_engine()
    engine.reply(toy_tokenizer.encode("zuka ? <answer> pelu <end>"))
    engine.hang_once()
    running = asyncio.create_task(run_evaluation(toy, plan(engine, limit=2, concurrency=1), folder))
    await until(engine.hanging.is_set, running)
    engine.has_ended = True
    engine.hang.set()
    with pytest.raises(BaseExceptionGroup) as gone:
        await asyncio.wait_for(running, WAIT_S)
    assert gone.group_contains(UnreachableError, match="no engine responds any more .*samples so far are kept", depth=2)
    assert len(lines(folder)) == 1, "the sample that the engine did not answer is missing, not failed"


async def test_two_evaluations_do_not_write_one_file(toy: Config, engine, toy_tokenizer, folder) -> None:
    engine.hang_once()
    running = asyncio.create_task(run_evaluation(toy, plan(engine), folder))
    await until(engine.hanging.is_set, running)
    with pytest.raises(DataError, match="another evaluation writes"):
        await run_evaluation(toy, plan(engine), folder, lock_wait_s=0.0)
    await cancelled(running)


async def test_a_damaged_line_is_named(make_config, engine, folder) -> None:
    config = instant(make_config, task={"num": 3})
    await run_evaluation(config, plan(engine, limit=2), folder)
    folder.samples.write_bytes(folder.samples.read_bytes() + b"{}\n")
    with pytest.raises(UserError, match=r"samples\.jsonl:3 is damaged: cursor"):
        await run_evaluation(config, plan(engine, limit=3), folder)


async def test_memory_and_tasks_are_bounded(make_config, engine, folder) -> None:
    """4,000 samples of 32 KB: 128 MB, of which no more than a few are in memory at any time."""
    config = instant(make_config, workflow={"answer": "kami", "repeats": 8_192})
    num_tasks: list[int] = []

    async def count_tasks() -> None:
        while True:
            num_tasks.append(len(asyncio.all_tasks()))
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_tasks())
    tracemalloc.start()
    try:
        report: EvaluationReport = await run_evaluation(config, plan(engine, limit=4_000, concurrency=8), folder)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        await cancelled(counting)
    assert report.num_done == 4_000
    assert folder.samples.stat().st_size > 128_000_000
    assert peak_bytes < 16_000_000
    assert max(num_tasks) < 8 + 12
