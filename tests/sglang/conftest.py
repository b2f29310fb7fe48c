"""One real server for all tests of a module. Each test has its own publisher and weight agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import torch

from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sglang_client import Retry, SGLangClient, UpdateMode, update_mode
from actor.weights.agent import AgentTimeouts, WeightAgent
from protocol.request_client import RequestClient
from tests.sglang.learner import weights_and_canary
from tests.sglang.server import API_KEY, Server, python, save_model
from tests.weights.engine_proxy import EngineProxy
from tests.weights.learner_side import RUN, WAIT_S, LearnerSide


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not python().is_file():
        pytest.fail(f"{python()} is missing: run `make test-sglang`, or set PALIMPSEST_SGLANG_PYTHON")
    with Server(model=model, log=tmp_path_factory.mktemp("log") / "sglang.log") as server:
        print(f"SGLang at {server.url} after {server.start_s:.1f} s")
        yield server


@pytest.fixture
async def learner() -> AsyncIterator[LearnerSide]:
    learner = LearnerSide()
    yield learner
    await learner.close()


@dataclass
class Attached:
    """The server, its agent, `proxy` between the two, and a pool that gets versions as from the coordinator."""

    server: Server
    proxy: EngineProxy
    client: SGLangClient
    agent: WeightAgent
    pool: EnginePool
    pause_mode: UpdateMode
    learner: LearnerSide
    model: Path

    async def publish(self, *, publication: int, version: int, scale: float, canary_off_by: float = 0.0) -> None:
        """Publishes the model, its last norm scaled by `scale`, and a canary that is off by `canary_off_by` nats."""
        data, canary = weights_and_canary(self.model, scale=scale)
        canary = canary.model_copy(update={"logprobs": [value - canary_off_by for value in canary.logprobs]})
        await self.learner.publish(data, publication=publication, version=version, canary=canary)

    async def until_served(self, publication: int) -> None:
        await self.learner.until(lambda: [known.publication for known in self.learner.serving()] == [publication])
        self.pool.set_engines([EngineInfo(known.url, known.version) for known in self.learner.serving()])

    async def install(self, *, publication: int, version: int, scale: float) -> None:
        """Publishes as `publish`, and waits until the server serves it."""
        await self.publish(publication=publication, version=version, scale=scale)
        await self.until_served(publication)

    async def until_running(self, num: int) -> None:
        await until_running(self.server, num)


async def until_running(server: Server, num: int) -> None:
    """Waits until the server runs `num` requests at once."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with asyncio.timeout(WAIT_S), aiohttp.ClientSession(server.url, headers=headers) as http:
        while True:
            async with http.get("/v1/loads") as response:
                loads = (await response.json())["loads"]
            if loads[0]["num_running_reqs"] >= num:
                return


@pytest.fixture
def pause_mode() -> UpdateMode | None:
    """The agent's `pause_mode`; None: the mode of the server's release. Tests set another value with `parametrize`."""
    return None


@pytest.fixture
async def attached(
    learner: LearnerSide, server: Server, model: Path, tmp_path: Path, pause_mode: UpdateMode | None
) -> AsyncIterator[Attached]:
    """The parts as `palimpsest engine --attach` connects them. Skips the test if the release cannot be retracted."""
    proxy = EngineProxy(server.url)
    await proxy.start()
    async with (
        SGLangClient(server.url, api_key=API_KEY) as client,
        SGLangClient(proxy.url, api_key=API_KEY) as proxied_client,
        RequestClient(learner.transport.dealer(learner.address)) as requests,
        EnginePool(run_id=RUN, api_key=API_KEY, retry=Retry(num_attempts=8, base_s=0.1, max_s=0.5)) as pool,
    ):
        supported = update_mode((await client.server_info()).version)
        if pause_mode == "retract" and supported != "retract":
            pytest.skip("this release of SGLang is paused with abort")
        agent = WeightAgent(
            name="sglang-0",
            engine=proxied_client,
            requests=requests,
            announcements=learner.transport.subscriber(learner.announcements.address),
            base_model=model,
            folder=tmp_path,
            url=server.url,
            pause_mode=pause_mode or supported,
            canary_tolerance=1e-3,
            timeouts=AgentTimeouts(report_every_s=0.05, retry_s=0.2),
        )
        running = asyncio.create_task(agent.run())
        yield Attached(server, proxy, client, agent, pool, pause_mode or supported, learner, model)
        assert not running.done(), "the agent must run until it is cancelled"
        running.cancel()
        await asyncio.wait([running])
    await proxy.stop()
