"""The launcher ends actors at once, although SIGTERM alone lets them finish their groups."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from learner.launch.process_plan import ProcessSpec
from learner.launch.supervisor import Supervisor

WAIT_S = 20.0
DRAINS_FOR_EVER = """
import asyncio
from protocol.role_startup import run_async

async def work():
    print("ready", flush=True)
    await asyncio.sleep(3600)

run_async(work(), drain=asyncio.Event())
"""


async def test_the_launcher_does_not_wait_for_an_actor_to_drain(tmp_path: Path) -> None:
    async with asyncio.timeout(2 * WAIT_S), Supervisor(tmp_path, stop_timeout_s=10 * WAIT_S) as supervisor:
        await supervisor.start([ProcessSpec("actor-0", "actor", (sys.executable, "-c", DRAINS_FOR_EVER))])
        while "ready" not in supervisor.log_path("actor-0").read_text():  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.02)
