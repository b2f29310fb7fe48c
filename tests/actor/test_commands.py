"""Actors and engines started by hand with an incomplete config fail at once with a one-sentence error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actor.build import run_actor
from actor.engine.server import EngineServer
from actor.engine_command import run_weight_agent, serve_engine
from protocol.config import (
    Config,
    EngineConfig,
    ModelConfig,
    NetworkConfig,
    RetrieverConfig,
    RunConfig,
    TaskConfig,
    WorkflowConfig,
)
from protocol.errors import ConfigError, SecurityError
from protocol.transport import create_keys
from tests.weights.models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    return Config(
        run=RunConfig(dir=tmp_path / "run"),
        model=ModelConfig(path=model),
        task=TaskConfig.model_validate({"use": "toy", "worlds": [1]}),
        workflow=WorkflowConfig.model_validate(
            {"rendering": "toy", "context_tokens": 64, "action_tokens": 8, "memory_tokens": 8}
        ),
        retriever=RetrieverConfig(indexes={"world-1": tmp_path / "index"}),
        engine=EngineConfig(max_running_requests=2),
    )


@pytest.fixture
async def server(model: Path) -> AsyncIterator[EngineServer]:
    server = EngineServer(model_path=model)
    await server.start()
    yield server
    await server.stop()


async def test_an_actor_without_the_runs_ports_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"network\.control_port and retriever\.port are 0"):
        await run_actor(config, name="actor-x")
    retriever = RetrieverConfig(port=1, indexes=config.retriever.indexes)
    for given in (retriever, RetrieverConfig(port=1), RetrieverConfig()):
        changed = config.model_copy(update={"retriever": given})
        with pytest.raises(ConfigError, match=r"^network\.control_port is 0: set it, or give the config\.json"):
            await run_actor(changed, name="actor-x")


async def test_an_engine_without_the_runs_ports_is_refused(config: Config, server: EngineServer) -> None:
    ports = r"network\.weights_port and network\.announce_port are 0"
    async with asyncio.timeout(20):
        with pytest.raises(ConfigError, match=ports):
            await run_weight_agent(config, name="engine-x", url=server.url, advertise=None, pause_mode="abort")
        with pytest.raises(ConfigError, match=ports):
            await serve_engine(config, name="engine-x", host="127.0.0.1", port=0, advertise=None)


async def test_an_engine_that_actors_of_other_nodes_cannot_reach_is_refused(
    config: Config, server: EngineServer, tmp_path: Path
) -> None:
    create_keys(tmp_path / "keys")
    network = NetworkConfig(host="10.0.0.1", weights_port=1, announce_port=2, keys=tmp_path / "keys")
    config = config.model_copy(update={"network": network})
    with pytest.raises(ConfigError, match=r"cannot reach an engine at .*--advertise URL"):
        await run_weight_agent(config, name="e", url=server.url, advertise=None, pause_mode="abort")
    with pytest.raises(SecurityError, match=r"network\.api_key_file"):
        await run_weight_agent(config, name="e", url=server.url, advertise="http://10.0.0.2:3", pause_mode="abort")
