"""One real server for all tests here; each test has a weight plane and a weight agent of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import torch

from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sglang_client import Retry, SGLangClient, update_mode
from actor.weights import agent as weight_agent
from actor.weights.agent import WeightAgent
from protocol.request_client import RequestClient
from tests.actor_plane.plane import RUN, WAIT_S, WeightPlane
from tests.sglang.learner import published
from tests.sglang.server import API_KEY, Server, python, save_model


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
async def plane() -> AsyncIterator[WeightPlane]:
    plane = WeightPlane()
    yield plane
    await plane.close()


@dataclass
class Attached:
    """The server with its agent, and a pool that is told of versions as the coordinator would."""

    server: Server
    client: SGLangClient
    agent: WeightAgent
    pool: EnginePool
    plane: WeightPlane
    model: Path

    async def publish(self, *, publication: int, version: int, scale: float, canary_off_by: float = 0.0) -> None:
        """Weights that differ from the model's in the last norm, by `scale`; `canary_off_by` nats."""
        data, canary = published(self.model, scale=scale)
        canary = canary.model_copy(update={"logprobs": [value - canary_off_by for value in canary.logprobs]})
        await self.plane.publish(data, publication=publication, version=version, canary=canary)

    async def until_served(self, publication: int) -> None:
        await self.plane.until(lambda: [known.publication for known in self.plane.known()] == [publication])
        self.pool.set_engines([EngineInfo(known.url, known.version) for known in self.plane.known()])

    async def bring(self, *, publication: int, version: int, scale: float) -> None:
        await self.publish(publication=publication, version=version, scale=scale)
        await self.until_served(publication)

    async def until_running(self, num: int) -> None:
        await until_running(self.server, num)


async def until_running(server: Server, num: int) -> None:
    """Until the server samples `num` requests at once."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with asyncio.timeout(WAIT_S), aiohttp.ClientSession(server.url, headers=headers) as http:
        while True:
            async with http.get("/v1/loads") as response:
                loads = (await response.json())["loads"]
            if loads[0]["num_running_reqs"] >= num:
                return


@pytest.fixture
async def attached(
    plane: WeightPlane, server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Attached]:
    """As `palimpsest engine --attach` puts it together."""
    monkeypatch.setattr(weight_agent, "_RETRY_S", 0.2)
    monkeypatch.setattr(weight_agent, "_REPORT_EVERY_S", 0.05)
    async with (
        SGLangClient(server.url, api_key=API_KEY) as client,
        RequestClient(plane.transport.dealer(plane.router.address)) as requests,
        EnginePool(run_id=RUN, api_key=API_KEY, retry=Retry(num_attempts=8, base_s=0.1, max_s=0.5)) as pool,
    ):
        agent = WeightAgent(
            name="sglang-0",
            engine=client,
            requests=requests,
            announcements=plane.transport.subscriber(plane.announcements.address),
            base_model=model,
            folder=tmp_path,
            url=server.url,
            pause_mode=update_mode((await client.server_info()).version),
            canary_tolerance=1e-3,
        )
        running = asyncio.create_task(agent.run())
        yield Attached(server, client, agent, pool, plane, model)
        assert not running.done(), "the agent runs until it is cancelled"
        running.cancel()
        await asyncio.wait([running])
