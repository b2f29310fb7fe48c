"""`palimpsest eval`: output files are checked before the first request and written at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from actor.command import evaluate
from actor.evaluation.evaluate import EvaluationPlan, run_evaluation
from actor.tasks.toy.tokenizer import write_tokenizer
from protocol.config import Config, ModelConfig, NetworkConfig, RetrieverConfig, TaskConfig, WorkflowConfig
from protocol.errors import DataError


@pytest.fixture
def config(tmp_path: Path, retriever) -> Config:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 98}')
    return Config(
        model=ModelConfig(path=tmp_path),
        task=TaskConfig.model_validate({"use": "toy", "worlds": [1], "eval_worlds": [1]}),
        workflow=WorkflowConfig.model_validate(
            {"rendering": "toy", "context_tokens": 100, "action_tokens": 8, "memory_tokens": 8}
        ),
        network=NetworkConfig(),
        retriever=RetrieverConfig(port=int(retriever.router.address.rpartition(":")[2])),
    )


def plan(url: str, out: Path | None = None, trajectories: Path | None = None) -> EvaluationPlan:
    return EvaluationPlan(
        engines=(url,), num_questions=1, temperature=0.0, concurrency=1, out=out, trajectories=trajectories
    )


async def test_summary_and_trajectories_are_written(config: Config, engine, toy_tokenizer, tmp_path: Path) -> None:
    engine.reply(toy_tokenizer.encode("zuka ? <answer> pelu <end>"))
    out, trajectories = tmp_path / "summary.json", tmp_path / "trajectories.jsonl"
    summary = await run_evaluation(config, plan(engine.url, out=out, trajectories=trajectories))
    assert json.loads(out.read_text(encoding="utf-8")) == summary
    (line,) = trajectories.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["answer"] == "pelu"


@pytest.mark.parametrize("name", ["out", "trajectories"])
@pytest.mark.parametrize("place", ["missing/file", "."])
async def test_an_unwritable_file_is_refused_before_any_request(
    config: Config, engine, tmp_path: Path, name: str, place: str
) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        await run_evaluation(config, plan(engine.url, **{name: tmp_path / place}))
    assert not engine.requests


@pytest.mark.parametrize("option", ["--questions", "--concurrency"])
def test_a_count_of_zero_is_refused(option: str) -> None:
    result = CliRunner().invoke(evaluate, ["run.toml", option, "0"])
    assert result.exit_code == 2
    assert option in result.output
