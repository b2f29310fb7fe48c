"""An actor whose config or files differ from the run's is refused: real coordinator, real runner, real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from actor.runner import Runner
from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer
from protocol.config_file import load_config
from protocol.errors import ConfigError
from protocol.messages import Lease
from protocol.run_identity import actor_identity
from protocol.transport import Transport
from protocol.types import TrajectoryGroup
from tests.network.peers import WAIT_S, Actor, Setting, open_network, serve_version
from tests.protocol.run_files import FILE_CHANGES, RunFiles, make_run_files


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    """The learner's files."""
    return make_run_files(tmp_path / "learner")


@pytest.fixture
def actor_files(tmp_path: Path) -> RunFiles:
    """The same files in another folder, as on another node."""
    return make_run_files(tmp_path / "actor")


def identity_of(files: RunFiles, *overrides: str) -> dict[str, str]:
    return actor_identity(load_config(files.config, overrides))


async def join(identity: Mapping[str, str], learner: Mapping[str, str], *, folder: Path) -> str:
    """Starts an actor in a run that can grant leases. Returns why it was refused; "leased" if it got a lease."""
    folder.mkdir(exist_ok=True)
    leased = asyncio.Event()

    async def rollout(_lease: Lease, _slot_free: object) -> TrajectoryGroup:
        leased.set()
        await asyncio.Event().wait()
        raise AssertionError

    with open_network(Setting(folder, identity=learner)) as network:
        await serve_version(network, 0)
        transport = Transport()
        runner = Runner(
            name="actor-0",
            capacity=16,
            dealer=transport.dealer(network.control_address),
            rollout=rollout,
            on_engines=lambda _: None,
            counters=dict,
            heartbeat_s=0.02,
            identity=identity,
        )
        running, waiting = asyncio.create_task(runner.run()), asyncio.create_task(leased.wait())
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            gauges = await asyncio.to_thread(network.run, network.coordinator.gauges())
            if leased.is_set():
                assert gauges["queue/actors_refused"] == 0
                return "leased"
            assert (gauges["queue/actors_refused"], gauges["queue/actors"], gauges["queue/running"]) == (1, 0, 0)
            with pytest.raises(ExceptionGroup) as caught:
                running.result()
            (error,) = caught.value.exceptions
            assert isinstance(error, ConfigError)
            return str(error)
        finally:
            for task in (running, waiting):
                task.cancel()
            await asyncio.wait([running, waiting])
            transport.close()


@pytest.mark.parametrize(("name", "key"), FILE_CHANGES.values(), ids=FILE_CHANGES)
async def test_one_changed_byte_on_the_actors_host_is_refused(
    files: RunFiles, actor_files: RunFiles, tmp_path: Path, name: str, key: str
) -> None:
    actor_files.change(name)
    reason = await join(identity_of(actor_files), identity_of(files), folder=tmp_path / "run")
    assert reason == (
        f"this actor may not join the run: {key}: the content differs between the run and this actor: start it with "
        "the run's config.json and the same files"
    )


CONFIG_CHANGES: dict[str, tuple[str, str]] = {
    "run.name": ("other", '"r"'),
    "run.seed": ("7", "0"),
    "task.use": ("own.task:Task", '"qa"'),
    "reward.use": ("em", '"f1"'),
    "reward.judge": ("strict", "no value"),
    "workflow.use": ("own.agent:Agent", '"memsearcher"'),
    "workflow.max_turns": ("9", "3"),
    "workflow.context_tokens": ("64", "6024"),
    "workflow.an_option_of_my_own": ("1", "no value"),
    "sampling.temperature": ("0.6", "1.0"),
    "learner.group_size": ("4", "2"),
}


@pytest.mark.parametrize("key", CONFIG_CHANGES)
async def test_a_changed_key_of_an_actor_is_refused(
    files: RunFiles, actor_files: RunFiles, tmp_path: Path, key: str
) -> None:
    value, expected = CONFIG_CHANGES[key]
    reason = await join(identity_of(actor_files, f"{key}={value}"), identity_of(files), folder=tmp_path / "run")
    assert f"{key}: the run has {expected}, this actor has " in reason


async def test_an_actor_without_an_identity_is_refused(files: RunFiles, tmp_path: Path) -> None:
    assert "may not join" in await join({}, identity_of(files), folder=tmp_path / "run")
    for text in ("", "[]", "{}", "not JSON", '{"$missing":"0"}', "[" * 4_000):
        nonsense = dict.fromkeys(identity_of(files), text)
        assert "may not join" in await join(nonsense, identity_of(files), folder=tmp_path / "run")


HOST_CHANGES = (
    "network.control_port=1234",
    "network.host=localhost",
    "actor.count=3",
    "actor.max_trajectories=8",
    "actor.request_timeout_s=5",
    "actor.search_timeout_s=5",
    "engine.max_total_tokens=99",
    "retriever.port=1235",
    "run.dir=elsewhere",
    "learner.num_steps=7",
    "learner.optimizer.learning_rate=0.5",
)


@pytest.mark.parametrize("change", ["", *HOST_CHANGES])
async def test_what_belongs_to_a_host_or_to_the_learner_may_differ(
    files: RunFiles, actor_files: RunFiles, tmp_path: Path, change: str
) -> None:
    overrides = [change] if change else []
    assert await join(identity_of(actor_files, *overrides), identity_of(files), folder=tmp_path / "run") == "leased"


@pytest.mark.parametrize("name", ["model/model.safetensors", "index/manifest.json", "questions.jsonl"])
async def test_a_file_that_one_host_does_not_have_is_not_compared(
    files: RunFiles, actor_files: RunFiles, tmp_path: Path, name: str
) -> None:
    (actor_files.folder / name).unlink()
    lacking, complete = identity_of(actor_files), identity_of(files)
    assert await join(lacking, complete, folder=tmp_path / "actor-lacks-it") == "leased"
    assert await join(complete, lacking, folder=tmp_path / "learner-lacks-it") == "leased"


async def test_the_users_code_of_the_actors_must_be_the_same(
    files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = ["workflow.use=identity_test_agent.main:Agent"]
    package = tmp_path / "code" / "identity_test_agent"
    package.mkdir(parents=True)
    absent = identity_of(files, *changed)
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("__init__.py", "main.py", "prompts.py"):
        (package / name).write_text("")
    first = identity_of(files, *changed)
    (package / "prompts.py").write_text("SYSTEM = 'be brief'")
    second = identity_of(files, *changed)
    assert "code.identity_test_agent.main: the content differs" in await join(second, first, folder=tmp_path / "run")
    assert await join(second, absent, folder=tmp_path / "run-2") == "leased"


async def test_a_refused_actor_is_logged_once_and_takes_no_lease_of_another(
    files: RunFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        open_network(Setting(tmp_path, identity={"sampling": '{"temperature":1.0}'})) as network,
    ):
        await serve_version(network, 0)
        async with Actor(network.control_address) as actor:
            for number in (1, 2, 3):
                await actor.heartbeat()
                await actor.until(lambda number=number: len(actor.drains) == number)
            assert actor.leases == []
            assert all(drain.refused for drain in actor.drains)
    assert len([each for each in caplog.records if "'actor-0' is refused: sampling" in each.getMessage()]) == 1


_TOY_CONFIG = """
[model]
path = "model"

[task]
use = "toy"
worlds = [1]

[workflow]
rendering = "toy"
context_tokens = 96
action_tokens = 8
memory_tokens = 8

[retriever]
port = 1
"""


async def test_palimpsest_actor_ends_with_exit_status_2(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY_SIZE}))
    path = tmp_path / "run.toml"
    path.write_text(_TOY_CONFIG)
    with open_network(Setting(tmp_path, identity=actor_identity(load_config(path)))) as network:
        port = network.control_address.rpartition(":")[2]
        arguments = ["--set", f"network.control_port={port}", "--set", "sampling.temperature=0.6"]
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "learner.launch", "actor", str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    problem = "sampling.temperature: the run has 1.0, this actor has 0.6"
    assert last.startswith(f"error: this actor may not join the run: {problem}: start it with ")
    assert "Traceback" not in done.stderr


def test_an_identity_is_small_and_has_no_path(files: RunFiles) -> None:
    identity = identity_of(files)
    assert len(json.dumps(identity)) < 2_000
    assert str(files.folder) not in json.dumps(identity)
