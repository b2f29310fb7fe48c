"""A publisher with its proxy, an embedded engine with its proxy, and the weight agent between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from actor.engine.server import EngineServer
from actor.engines.sglang_client import SGLangClient, UpdateMode
from actor.weights.agent import AgentTimeouts, WeightAgent
from protocol.request_client import RequestClient
from protocol.types import PolicyTag
from tests.weights.engine_proxy import EngineProxy
from tests.weights.learner_side import WAIT_S, LearnerSide
from tests.weights.models import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def learner() -> AsyncIterator[LearnerSide]:
    learner = LearnerSide()
    yield learner
    await learner.close()


@pytest.fixture
async def requests(learner: LearnerSide) -> AsyncIterator[RequestClient]:
    async with RequestClient(learner.transport.dealer(learner.address)) as client:
        yield client


@dataclass
class EngineUnderTest:
    """An embedded engine, its agent, and `proxy` between the two. `client` is connected to the engine directly."""

    server: EngineServer
    proxy: EngineProxy
    client: SGLangClient
    agent: WeightAgent

    async def tag(self) -> PolicyTag | None:
        """Returns the version that the engine serves; None before the first update."""
        text = (await self.client.model_info()).weight_version or "default"
        return None if text == "default" else PolicyTag.parse(text)

    async def until_internal_state(self, is_reached: Callable[[dict], bool]) -> None:
        """Polls `internal_states` of /server_info."""
        async with asyncio.timeout(WAIT_S), aiohttp.ClientSession(self.server.url) as http:
            while True:
                async with http.get("/server_info") as response:
                    if is_reached((await response.json())["internal_states"][0]):
                        return


@pytest.fixture
def pause_mode() -> UpdateMode:
    """The agent's `pause_mode`; tests set another value with `parametrize`."""
    return "retract"


@pytest.fixture
def canary_s() -> float:
    """The agent's time-out of the canary; tests set another value with `parametrize`."""
    return 60.0


@pytest.fixture
async def engine(
    learner: LearnerSide, requests: RequestClient, model: Path, tmp_path: Path, pause_mode: UpdateMode, canary_s: float
) -> AsyncIterator[EngineUnderTest]:
    """The agent's weight files are in `tmp_path`/agent."""
    server = EngineServer(model_path=model)
    await server.start()
    proxy = EngineProxy(server.url)
    await proxy.start()
    async with SGLangClient(server.url) as client, SGLangClient(proxy.url) as proxied_client:
        agent = WeightAgent(
            name="engine-0",
            engine=proxied_client,
            requests=requests,
            announcements=learner.transport.subscriber(learner.announcements.address),
            base_model=model,
            folder=tmp_path / "agent",
            url=server.url,
            pause_mode=pause_mode,
            canary_tolerance=1e-3,
            timeouts=AgentTimeouts(report_every_s=0.05, retry_s=0.05, canary_s=canary_s),
        )
        running = asyncio.create_task(agent.run())
        yield EngineUnderTest(server, proxy, client, agent)
        assert not running.done(), "the agent must run until it is cancelled"
        running.cancel()
        await asyncio.wait([running])
    await proxy.stop()
    await server.stop()


def serves(learner: LearnerSide, publication: int) -> Callable[[], bool]:
    """Returns a condition: the only engine serves `publication`."""
    return lambda: [engine.publication for engine in learner.serving()] == [publication]
