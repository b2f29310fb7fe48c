"""Roles that are started by hand say in one sentence what they lack, instead of waiting for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actor.build import run_actor
from actor.engine import command as engine_command
from actor.engine.server import EngineServer
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
from tests.actor_plane.test_weight_agent import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    return Config(
        run=RunConfig(dir=tmp_path / "run"),
        model=ModelConfig(path=model),
        task=TaskConfig(kind="toy", worlds=(1,)),
        workflow=WorkflowConfig(rendering="toy", context_tokens=64, action_tokens=8, memory_tokens=8),
        engine=EngineConfig(max_running_requests=2),
    )


@pytest.fixture
async def server(model: Path) -> AsyncIterator[EngineServer]:
    server = EngineServer(model_path=model)
    await server.start()
    yield server
    await server.stop()


async def test_an_actor_needs_the_runs_ports(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"network\.control_port and retriever\.port are 0"):
        await run_actor(config, name="actor-x")
    given = config.model_copy(update={"retriever": RetrieverConfig(port=1)})
    with pytest.raises(ConfigError, match=r"^network\.control_port is 0: set it, or give the config\.json"):
        await run_actor(given, name="actor-x")


async def test_an_engine_needs_the_runs_ports(config: Config, server: EngineServer) -> None:
    ports = r"network\.weights_port and network\.announce_port are 0"
    async with asyncio.timeout(20):
        with pytest.raises(ConfigError, match=ports):
            await engine_command._keep_current(
                config, name="engine-x", url=server.url, advertise=None, pause_mode="abort"
            )
        with pytest.raises(ConfigError, match=ports):
            await engine_command._serve(config, name="engine-x", host="127.0.0.1", port=0, advertise=None)


async def test_an_engine_must_be_reachable_from_where_actors_are(
    config: Config, server: EngineServer, tmp_path: Path
) -> None:
    create_keys(tmp_path / "keys")
    network = NetworkConfig(host="10.0.0.1", weights_port=1, announce_port=2, keys=tmp_path / "keys")
    config = config.model_copy(update={"network": network})
    with pytest.raises(ConfigError, match=r"cannot reach an engine at .*--advertise URL"):
        await engine_command._keep_current(config, name="e", url=server.url, advertise=None, pause_mode="abort")
    with pytest.raises(SecurityError, match=r"network\.api_key_file"):
        await engine_command._keep_current(
            config, name="e", url=server.url, advertise="http://10.0.0.2:3", pause_mode="abort"
        )
