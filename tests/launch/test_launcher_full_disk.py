"""The launcher continues on a full disk, and writes its files again when there is room."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from learner.launch.restart_policy import RestartPolicy
from learner.launch.supervisor import Supervisor
from tests.launch.test_supervisor import SLEEP, pids, python, until
from tests.store.small_disk import fill, small_disk

WAIT_S = 30.0


async def test_a_full_disk_does_not_end_the_launcher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with small_disk(tmp_path / "disk", num_bytes=1 << 20) as disk:
        async with Supervisor(disk, restart_policy=RestartPolicy(base_pause_s=0.0)) as supervisor:
            await supervisor.start([python("role", started), python("other", SLEEP)])
            first = pids(disk)
            assert list(first) == ["role", "other"]

            ballast = fill(disk)
            os.kill(first["role"], signal.SIGKILL)
            await until(lambda: supervisor.states()["role"] == ("running", 1))
            assert "processes.json cannot be written: No space left on device" in caplog.text

            ballast.unlink()
            os.kill(first["other"], signal.SIGKILL)
            await until(lambda: pids(disk).get("other") not in (None, first["other"]))
            assert pids(disk)["role"] != first["role"]
            async with asyncio.timeout(WAIT_S):
                await supervisor.stop(["role", "other"])
