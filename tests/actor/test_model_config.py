"""What would fail every episode is refused at start-up."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from actor.build import open_parts
from actor.chat.chatml import ChatRendering
from actor.chat.check_model import ModelLimits, check_model, read_limits
from actor.chat.tokenizer import Tokenizer
from actor.chat.toy import ToyRendering
from actor.engines.sampling import SamplingParams
from actor.tasks.build import training_task
from actor.tasks.toy.tokenizer import write_tokenizer
from protocol.config import Config, ModelConfig, TaskConfig, WorkflowConfig
from protocol.errors import ConfigError, DataError


def write_model(folder: Path, **fields: object) -> Path:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({"vocab_size": 98, "max_position_embeddings": 512, "model_type": "qwen2"}, ModelLimits(98, 512)),
        ({"text_config": {"vocab_size": 98, "max_position_embeddings": 512}}, ModelLimits(98, 512)),
        ({}, ModelLimits(None, None)),
    ],
)
def test_limits_are_read(tmp_path: Path, fields: dict, limits: ModelLimits) -> None:
    assert read_limits(write_model(tmp_path, **fields)) == limits
    check_model(tmp_path, tokenizer=Tokenizer.load(tmp_path), rendering=ToyRendering(), context_tokens=512)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"vocab_size": "many"}'])
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        read_limits(tmp_path)


def test_a_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=97)
    with pytest.raises(DataError, match=r"vocab_size = 97.*the highest is 97"):
        check_model(tmp_path, tokenizer=Tokenizer.load(tmp_path), rendering=ToyRendering(), context_tokens=8)


def test_ids_with_gaps_are_counted_by_the_highest(toy_tokenizer: Tokenizer) -> None:
    assert toy_tokenizer.num_ids == 98


def test_an_end_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=98)
    with pytest.raises(DataError, match=r"no token '<\|im_end\|>'"):
        check_model(tmp_path, tokenizer=Tokenizer.load(tmp_path), rendering=ChatRendering(), context_tokens=8)


async def test_an_actor_starts_with_these_checks(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=98, max_position_embeddings=64)
    workflow = WorkflowConfig(rendering="toy", context_tokens=65, action_tokens=8, memory_tokens=8)
    config = Config(model=ModelConfig(path=tmp_path), task=TaskConfig(kind="toy", worlds=(1,)), workflow=workflow)
    async with AsyncExitStack() as stack:
        with pytest.raises(ConfigError, match=r"max_position_embeddings = 64 .*, got 65"):
            await open_parts(
                config,
                training_task(config.task, seed=0),
                stack,
                sampling=SamplingParams(),
                run_id="run",
                max_trajectories=1,
            )
