"""A config, tokenizer or model that would fail every episode is refused at start-up."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from actor.build import open_parts
from actor.chat.check_model import ModelLimits, check_model, read_limits
from actor.chat.tokenizer import Tokenizer
from actor.check import check_actor
from actor.engines.sampling import SamplingParams
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.workflows.memsearcher import MemSearcher, MemSearcherOptions
from protocol.check_result import raise_first_failure
from protocol.config import Config
from protocol.errors import ConfigError, DataError
from tests.actor.search_tool import search_tool


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
def test_read_limits_reads_both_fields_or_the_text_config(tmp_path: Path, fields: dict, limits: ModelLimits) -> None:
    assert read_limits(write_model(tmp_path, **fields)) == limits
    check_model(tmp_path, tokenizer=Tokenizer.load(tmp_path), context_tokens=512)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"vocab_size": "many"}'])
def test_a_model_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        read_limits(tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizers_ids_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=97)
    with pytest.raises(DataError, match=r"vocab_size = 97.*the highest is 97"):
        check_model(tmp_path, tokenizer=Tokenizer.load(tmp_path), context_tokens=8)


def test_num_ids_is_the_highest_id_plus_one(toy_tokenizer: Tokenizer) -> None:
    assert toy_tokenizer.num_ids == 98


@pytest.mark.parametrize("rendering", ["toy", "chat"])
def test_the_end_token_of_the_rendering_must_be_in_the_tokenizer(tmp_path: Path, rendering: str) -> None:
    write_model(tmp_path, vocab_size=98)
    options = MemSearcherOptions.model_validate({"rendering": rendering})
    workflow = MemSearcher(options, tools={"search": search_tool()}, context_tokens=6_000)
    tokenizer = Tokenizer.load(tmp_path)  # the toy tokenizer: it has <end>, but no chat tokens
    if rendering == "toy":
        workflow.check(tokenizer)
    else:
        with pytest.raises(DataError, match=r"no token '<\|im_end\|>'"):
            workflow.check(tokenizer)


def make_config(model: Path, *, retriever: dict[str, object], **workflow: object) -> Config:
    """A run of the toy on `model`, with small budgets."""
    budgets = {"rendering": "toy", "context_tokens": 64, "action_tokens": 8, "memory_tokens": 8}
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "task": {"use": "toy", "worlds": [1]},
            "workflow": {**budgets, **workflow},
            "retriever": retriever,
        }
    )


async def open_for_training(config: Config) -> None:
    """Opens the resources that an actor opens before its first lease, and closes them."""
    async with AsyncExitStack() as stack:
        await open_parts(config, stack, split="train", sampling=SamplingParams(), run_id="run", max_trajectories=1)


async def test_an_actor_refuses_contexts_longer_than_the_models_positions(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=98, max_position_embeddings=64)
    config = make_config(tmp_path, retriever={"port": 1}, context_tokens=65)
    with pytest.raises(ConfigError, match=r"max_position_embeddings = 64 .*, got 65"):
        await open_for_training(config)
    with pytest.raises(ConfigError, match=r"max_position_embeddings = 64 .*, got 65"):
        raise_first_failure(check_actor(config))


async def test_an_actor_refuses_a_tokenizer_without_the_end_token(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=98)
    config = make_config(tmp_path, retriever={"port": 1}, rendering="chat")
    with pytest.raises(DataError, match=r"no token '<\|im_end\|>'"):
        await open_for_training(config)
    with pytest.raises(ConfigError, match=r"no token '<\|im_end\|>'"):
        raise_first_failure(check_actor(config))


async def test_an_actor_whose_tools_search_needs_a_retriever(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=98)
    config = make_config(tmp_path, retriever={})
    with pytest.raises(ConfigError, match=r"the tool search needs a retriever"):
        await open_for_training(config)
    with pytest.raises(ConfigError, match=r"the tool search needs a retriever"):
        raise_first_failure(check_actor(config))


async def test_a_config_without_faults_is_accepted(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=98, max_position_embeddings=64)
    config = make_config(tmp_path, retriever={"port": 1})
    raise_first_failure(check_actor(config))
    await open_for_training(config)
