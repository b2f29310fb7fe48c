"""SIGTERM drains a real actor process that works for a real coordinator; the test plays the engine."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from aiohttp import web

from actor.tasks.toy.tokenizer import write_tokenizer
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.messages import EngineFields
from protocol.weight_messages import EngineReport
from tests.leases.groups import GROUP_SIZE, RUN
from tests.network.peers import WAIT_S, Setting, open_network

LONG_S = 3_600.0
PUBLICATION = 1
AGENT = """
from actor.episode import Episode
from actor.rewards.reward import Reward, Score
from actor.tasks.task import Task
from actor.workflows.workflow import Workflow
from protocol.types import Question

class OneToken(Workflow):
    async def run(self, question, session):
        session.open_context([int(question.id)])
        await session.generate(1)
        return Episode(answer="w1")

class Zero(Reward):
    async def score(self, question, episode, trajectory):
        return Score(0.0)

class Numbers(Task):
    def question(self, cursor):
        return Question(str(cursor), "who?", ("w1",))
"""
CONFIG = f"""
[run]
name = "{RUN}"
dir = "run"
[model]
path = "model"
[task]
use = "waiting_agent:Numbers"
[reward]
use = "waiting_agent:Zero"
[workflow]
use = "waiting_agent:OneToken"
context_tokens = 8
[actor]
max_trajectories = {2 * GROUP_SIZE}
[learner]
group_size = {GROUP_SIZE}
"""


class GatedEngine:
    """An engine over HTTP that answers requests for a question after `open` is called for the question's cursor."""

    def __init__(self) -> None:
        self.url = ""
        self.num_requests: Counter[int] = Counter()
        self._gates: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    def open(self, cursor: int) -> None:
        self._gates[cursor].set()

    async def generate(self, request: web.Request) -> web.Response:
        (cursor,) = (await request.json())["input_ids"]
        self.num_requests[cursor] += 1
        await self._gates[cursor].wait()
        version = f"{RUN}:{PUBLICATION}:0"
        meta = {
            "finish_reason": {"type": "length"},
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": 1}],
            "output_token_logprobs": [[-1.0, 3, None]],
        }
        return web.json_response({"output_ids": [3], "meta_info": meta})

    async def model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": "none", "weight_version": f"{RUN}:{PUBLICATION}:0"})


class ActorProcess:
    """An actor with two leases, whose trajectories all wait at the engine."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        *,
        engine: GatedEngine,
        network: NetworkThread,
        log: Path,
        folder: Path,
    ) -> None:
        self.process, self.engine = process, engine
        self._network, self._log, self._folder = network, log, folder

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(3 * WAIT_S):
            while not condition():
                assert self.process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.02)  # polls the log or the store of another thread

    async def until_draining(self) -> None:
        await self.until(lambda: "draining: " in self._log.read_text())

    def outcomes(self) -> tuple[str, str]:
        """The outcomes of the first two leases. Another one may have been under way when SIGTERM came: it is back."""
        with closing(Store(RunFolder(self._folder).store, read_only=True)) as store:
            first, second, *others = [row[0] for row in store.query("SELECT outcome FROM leases ORDER BY lease_id")]
        assert set(others) <= {"running", "returned"}
        return first, second

    async def ended(self) -> float:
        """Waits for the end of the process; returns the seconds that this took. Checks that no lease has expired."""
        start_s = time.monotonic()
        async with asyncio.timeout(3 * WAIT_S):
            status = await self.process.wait()
            seconds = time.monotonic() - start_s
            assert status == 130, self._log.read_text()
            while (gauges := await self._gauges())["queue/actors"]:  # noqa: ASYNC110 (until Goodbye is read)
                await asyncio.sleep(0.02)
        assert (gauges["queue/expired"], gauges["queue/running"]) == (0, 0)
        return seconds

    async def _gauges(self) -> dict[str, float]:
        return await asyncio.to_thread(self._network.run, self._network.coordinator.gauges())


def serve(network: NetworkThread, url: str) -> None:
    """Makes version 0 known and reports an engine that serves it for the rest of the test."""
    assert network.run(network.coordinator.new_publication(0)) == PUBLICATION
    fields = EngineFields(name="engine-0", url=url, version=0, publication=PUBLICATION)
    report = EngineReport(request_id=1, engine=fields, state="serving")
    network.engines.report(report, now_s=time.monotonic() + LONG_S)


@asynccontextmanager
async def working_actor(folder: Path, *, drain_s: float) -> AsyncIterator[ActorProcess]:
    (folder / "waiting_agent.py").write_text(AGENT)
    (folder / "run.toml").write_text(CONFIG)
    (folder / "run").mkdir()
    write_tokenizer(folder / "model")
    (folder / "model" / "config.json").write_text("{}")
    engine, app = GatedEngine(), web.Application()
    app.router.add_post("/generate", engine.generate)
    app.router.add_get("/model_info", engine.model_info)
    http = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await http.setup()
    await web.TCPSite(http, "127.0.0.1", 0).start()
    host, port = http.addresses[0][:2]
    with open_network(Setting(folder / "run")) as network:
        await asyncio.to_thread(serve, network, f"http://{host}:{port}")
        log = folder / "actor.log"
        argv = ["actor", "run.toml", "--name", "actor-0", "--drain-s", str(drain_s)]
        argv += ["--set", f"network.control_port={network.control_address.rsplit(':', 1)[1]}"]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "learner.launch", *argv, cwd=folder, stdout=output, stderr=output
            )
        actor = ActorProcess(process, engine=engine, network=network, log=log, folder=folder / "run")
        try:
            await actor.until(lambda: engine.num_requests == {0: GROUP_SIZE, 1: GROUP_SIZE})
            yield actor
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await http.cleanup()


async def test_sigterm_finishes_the_groups_and_takes_no_lease(tmp_path: Path) -> None:
    async with working_actor(tmp_path, drain_s=LONG_S) as actor:
        actor.process.send_signal(signal.SIGTERM)
        await actor.until_draining()
        actor.engine.open(1)
        await actor.until(lambda: actor.outcomes()[1] == "accepted")
        actor.engine.open(0)
        assert await actor.ended() < WAIT_S
        assert actor.outcomes() == ("accepted", "accepted")


async def test_groups_that_do_not_finish_in_drain_s_are_given_back_and_finished_ones_are_not_lost(
    tmp_path: Path,
) -> None:
    drain_s = 2.0
    async with working_actor(tmp_path, drain_s=drain_s) as actor:
        actor.process.send_signal(signal.SIGTERM)
        await actor.until_draining()
        actor.engine.open(0)
        assert await actor.ended() < drain_s + 3.0
        assert actor.outcomes() == ("accepted", "returned")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_a_draining_actor_at_once(tmp_path: Path, second: signal.Signals) -> None:
    async with working_actor(tmp_path, drain_s=LONG_S) as actor:
        actor.process.send_signal(signal.SIGTERM)
        await actor.until_draining()
        actor.process.send_signal(second)
        assert await actor.ended() < WAIT_S
        assert actor.outcomes() == ("returned", "returned")
