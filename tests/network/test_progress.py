"""What the learner reports while it waits, and the ends of runs without progress, over real sockets and files."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.no_progress import ProgressLimits
from learner.leases.received_groups import MAX_FAILURES
from learner.leases.wait_cause import RunState
from learner.metrics.progress import Progress, progress_lines
from learner.network.network_thread import NetworkThread
from learner.network.progress_reporter import ProgressReporter
from learner.store.run_folder import RunFolder
from protocol.errors import NoProgressError
from protocol.messages import Lease
from protocol.types import Status, TrajectoryGroup
from tests.leases.groups import make_group
from tests.network.peers import WAIT_S, Actor, Setting, next_batch, open_network, report_engine, serve_version

REASON = "SearchFailed: the retriever at tcp://127.0.0.1:1 did not answer in 30 s"


def failed_group(lease: Lease) -> TrajectoryGroup:
    group = make_group(lease)
    return replace(group, trajectories=tuple(replace(t, status=Status.FAILED) for t in group.trajectories))


def flat_group(lease: Lease) -> TrajectoryGroup:
    group = make_group(lease)
    return replace(group, trajectories=tuple(replace(t, reward=0.0) for t in group.trajectories))


async def run_state(network: NetworkThread) -> RunState:
    return await asyncio.to_thread(network.run, network.coordinator.run_state())


async def test_failed_groups_in_a_row_end_the_wait_with_the_most_frequent_reason(tmp_path: Path) -> None:
    setting = Setting(tmp_path, limits=ProgressLimits(max_failed=3), num_first_samples=4)
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            waiting = asyncio.ensure_future(next_batch(network))
            await actor.until_leased(3)
            for lease in list(actor.leases)[:3]:
                await actor.submit(failed_group(lease), lease_id=lease.lease_id)
                actor.held.discard(lease.lease_id)
            state = await run_state(network)
            assert (state.num_failed_in_a_row, len(state.first_samples), state.num_ready) == (3, 4, 0)
            assert not waiting.done()
            await actor.heartbeat({REASON: 5, "other": 1})
            with pytest.raises(NoProgressError, match=r"3 groups in a row failed .*\(5 of 6 trajectories\): Search"):
                await waiting
            assert (await run_state(network)).failures == {REASON: 5, "other": 1}


async def test_groups_without_signal_end_the_wait(tmp_path: Path) -> None:
    setting = Setting(tmp_path, skip_zero_variance=True, limits=ProgressLimits(max_skipped=5))
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            waiting = asyncio.ensure_future(next_batch(network))
            for num in range(5):
                await actor.until_leased(num + 1)
                lease = actor.leases[num]
                assert (await actor.submit(flat_group(lease), lease_id=lease.lease_id)).outcome == "accepted"
                actor.held.discard(lease.lease_id)
            await actor.heartbeat()
            with pytest.raises(NoProgressError, match="every reward is 0 in the last 5 groups"):
                await waiting


async def test_a_question_whose_actor_dies_again_and_again_is_skipped(tmp_path: Path) -> None:
    """Also over a restart of the learner. A goodbye and a restart of the learner do not count."""
    setting = Setting(tmp_path, groups_per_batch=1, staleness_bound=0, timeouts=LeaseTimeouts(lease_timeout_s=60.0))
    num_deaths = 0

    async def die(network: NetworkThread, *, goodbye: bool) -> Lease:
        nonlocal num_deaths
        num_deaths += 1
        async with Actor(network.control_address, incarnation=str(num_deaths), capacity=1) as actor:
            await actor.until_leased(1)
            if goodbye:
                await actor.goodbye()
                await actor.until_status()
                await actor.goodbye()
            return actor.leases[0]

    with open_network(setting) as network:
        await serve_version(network, 0)
        for goodbye in (False, False, True, True):
            assert (await die(network, goodbye=goodbye)).cursor == 0
    with open_network(setting) as network:
        await serve_version(network, 0)
        async with Actor(network.control_address, incarnation="last", capacity=1) as actor:
            await actor.heartbeat()
            await actor.goodbye()
        for _ in range(MAX_FAILURES - 2):
            assert (await die(network, goodbye=False)).cursor == 0
        assert (await run_state(network)).fatal_questions == ()
        async with Actor(network.control_address, incarnation="survivor", capacity=1) as actor:
            leases = await actor.until_leased(1)
            assert leases[0].cursor == 1
        assert (await run_state(network)).fatal_questions == (0,)


class Texts(dict[str, str]):
    """Texts by tag, as written to TensorBoard."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, tag: str, markdown: str, step: int) -> None:
        self[tag] = markdown
        self.written.set()


async def until_text(folder: RunFolder, *words: str) -> Progress:
    """Waits until progress.json contains a sentence with these words."""
    async with asyncio.timeout(WAIT_S):
        while True:
            progress = Progress.read(folder.progress)
            if progress is not None and all(word in "\n".join(progress_lines(progress, now=0.0)) for word in words):
                return progress
            await asyncio.sleep(0.02)


async def test_progress_json_states_the_cause_of_a_wait_and_the_failures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    folder, texts = RunFolder(tmp_path), Texts()
    with open_network(Setting(tmp_path, num_first_samples=4)) as network:
        reporter = ProgressReporter(folder, num_steps=3, log_every_s=0.01)
        state = lambda: network.run(network.coordinator.run_state(), timeout_s=WAIT_S)  # noqa: E731
        with reporter:
            await until_text(folder, "starting: loading model and checkpoint")
            with reporter.attached(state=state, write_text=texts.write):
                reporter.enter("waiting", step=0)
                await until_text(folder, "waiting for the batch of step 0, 0 of 2 groups: no engine is connected")
                await report_engine(network, version=-1, publication=-1, state="joining")
                await until_text(folder, "no engine serves: engine-0 is joining")
                await serve_version(network, 0)
                await until_text(folder, "no actor is connected")
                async with Actor(network.control_address) as actor:
                    await actor.until_leased(2)
                    await until_text(folder, "0 of 2 groups: oldest lease", "s at actor-0")
                    for lease in actor.leases[:2]:
                        await actor.submit(failed_group(lease), lease_id=lease.lease_id)
                    await actor.heartbeat({REASON: 4})
                    progress = await until_text(folder, f"4 failed: {REASON} (4)", "warning: every trajectory failed")
                    assert (progress.phase, progress.failures) == ("waiting", {REASON: 4})
                    assert await asyncio.to_thread(texts.written.wait, WAIT_S)
                    reporter.enter("training", step=0)
                    await until_text(folder, "training step 0")
        done = Progress.read(folder.progress)
    assert done is not None
    assert (done.phase, done.text) == ("done", "the run has completed its last step, 0")
    assert REASON in texts["trajectories/failures"]
    assert folder.first_samples.read_text() == capsys.readouterr().out
    assert "  endings   failed 4\n" in folder.first_samples.read_text()
    assert any("waiting for the batch of step 0, 0 of 2 groups: no engine" in r.getMessage() for r in caplog.records)
    assert any(f"4 failed: {REASON} (4)" in record.getMessage() for record in caplog.records)


async def test_a_checkpoint_that_cannot_be_written_is_a_warning_until_one_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with ProgressReporter(folder, num_steps=3, log_every_s=60.0) as reporter:
        reporter.checkpoint_failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), step=2)
        await until_text(folder, "warning: the checkpoint of step 2 cannot be written: No space left on device")
        reporter.checkpoint_saved()
    progress = Progress.read(folder.progress)
    assert progress is not None
    assert progress.warnings == ()


def test_a_failed_learner_leaves_its_error_in_progress_json(tmp_path: Path) -> None:
    reporter = ProgressReporter(RunFolder(tmp_path), num_steps=3, log_every_s=60.0)
    with pytest.raises(NoProgressError), reporter:  # noqa: PT012
        reporter.enter("waiting", step=2)
        raise NoProgressError("the run ended: why")
    progress = Progress.read(RunFolder(tmp_path).progress)
    assert progress is not None
    assert (progress.phase, progress.text) == ("failed", "the learner ended at step 2: the run ended: why")


def test_an_old_or_damaged_progress_json_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    assert progress_lines(Progress.read(path), now=0.0) == ["the learner has not started"]
    path.write_text('{"phase": "waiting"')
    assert Progress.read(path) is None
    progress = Progress(phase="training", step=1, num_steps=2, since=90.0, written=100.0, text="training step 1")
    progress.write(path)
    assert Progress.read(path) == progress
    assert progress_lines(progress, now=105.0) == ["training step 1"]
    assert progress_lines(progress, now=140.0) == ["training step 1 (reported 40 s ago)"]
    assert progress_lines(replace(progress, phase="done"), now=140.0) == ["training step 1"]
