"""The command line: help imports nothing heavy; bad input prints one sentence and exits with status 2."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.tiny_run import TinyRun, make_tiny_run

TIMEOUT_S = 60.0
HEAVY = ("torch", "transformers", "zmq", "pydantic", "numpy", "asyncio", "rich", "aiohttp", "msgpack")


@dataclass(frozen=True, slots=True)
class Output:
    status: int
    out: str
    err: str


def palimpsest(*arguments: str | Path, cwd: Path | None = None) -> Output:
    done = subprocess.run(
        [sys.executable, "-m", "learner.launch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Output(done.returncode, done.stdout, done.stderr)


def refused(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Asserts exit status 2 and returns the message on stderr, which may only have log lines before it."""
    output = palimpsest(*arguments, cwd=cwd)
    assert output.status == 2, output
    *log, last = output.err.strip().splitlines()
    assert last.startswith("error: "), output.err
    assert not any("Traceback" in line or line.startswith("error:") for line in log), output.err
    return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    holder = socket.create_server(("127.0.0.1", 0))
    yield holder.getsockname()[1]
    holder.close()


def help_of(*arguments: str) -> str:
    """The output of `palimpsest ARGUMENTS --help`, then the list of heavy modules that it imported."""
    code = (
        "import sys\n"
        "from learner.launch.cli import main\n"
        f"sys.argv = ['palimpsest', *{arguments!r}, '--help']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    output = help_of()
    assert "HEAVY []" in output
    for name in ("demo", "up", "learner", "actor", "engine", "retriever", "index", "eval", "audit", "chaos", "keys"):
        assert f"\n  {name} " in output


@pytest.mark.parametrize("name", ["demo", "up", "learner", "actor", "engine", "retriever", "index", "eval", "audit"])
def test_every_command_has_help(name: str) -> None:
    output = help_of(name)
    assert f"Usage: palimpsest {name} " in output
    assert "HEAVY []" in output


def test_unknown_commands_and_options() -> None:
    output = palimpsest("trian")
    assert (output.status, "No such command 'trian'" in output.err) == (2, True)
    output = palimpsest("up", "run.toml", "--fast")
    assert (output.status, "No such option" in output.err) == (2, True)


@pytest.mark.parametrize("role", ["up", "learner", "actor", "engine", "eval"])
def test_an_unknown_config_key(run: TinyRun, tmp_path: Path, role: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "m"\n[task]\nuse = "toy"\nworlds = [1]\n[learner]\nclip = 1\n')
    message = refused(role, path)
    assert message.startswith(f"{path}: learner.clip: unknown key; known here: num_steps, groups_per_batch, ")


def test_a_bad_value(run: TinyRun) -> None:
    message = refused("learner", run.config, "--set", "learner.staleness_bound=-1")
    assert "learner.staleness_bound: must be >= 0, got -1" in message


@pytest.mark.parametrize("role", ["up", "learner"])
def test_a_missing_config(tmp_path: Path, role: str) -> None:
    assert refused(role, tmp_path / "no.toml") == f"config {tmp_path}/no.toml cannot be read: No such file or directory"


def test_a_corpus_line_without_text(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": "red"}\n{"id": "b"}\n')
    message = refused("index", corpus, "--out", tmp_path / "index", "--encoder", "bow")
    assert f"{corpus}" in message
    assert "2" in message
    assert "text" in message
    assert not (tmp_path / "index").exists()


def test_an_index_made_with_another_encoder(run: TinyRun) -> None:
    message = refused("retriever", run.index, "--encoder", run.model, "--address", "tcp://127.0.0.1:0")
    assert "another encoder" in message
    assert str(run.index) in message


def test_an_unreachable_engine(run: TinyRun) -> None:
    message = refused("engine", run.config, "--attach", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1" in message
    assert "start it" in message
    message = refused("eval", run.config, "--engine", "http://127.0.0.1:1", "--limit", "1")
    assert "engine http://127.0.0.1:1 does not respond" in message
    assert "start it, or correct --engine" in message


def test_the_retrievers_port_is_in_use(run: TinyRun, taken_port: int) -> None:
    address = f"tcp://127.0.0.1:{taken_port}"
    assert f"cannot listen on {address}" in refused("retriever", run.index, "--address", address)


def test_the_learners_port_is_in_use(run: TinyRun, taken_port: int) -> None:
    ports = {"control_port": taken_port, "weights_port": 1, "announce_port": 1}
    sets = [argument for key, port in ports.items() for argument in ("--set", f"network.{key}={port}")]
    message = refused("learner", run.config, *sets)
    assert f"cannot listen on tcp://127.0.0.1:{taken_port}: Address already in use" in message


def test_the_engines_port_is_in_use(run: TinyRun, taken_port: int) -> None:
    message = refused("engine", run.config, "--frozen", "1", "--port", str(taken_port))
    assert str(taken_port) in message
    assert "in use" in message


@pytest.mark.parametrize(
    ("role", "keys"),
    [("learner", "network.control_port and network.weights_port"), ("engine", "network.weights_port and network.anno")],
)
def test_ports_that_other_processes_must_know_are_0(run: TinyRun, role: str, keys: str) -> None:
    assert keys in refused(role, run.config)


@pytest.mark.parametrize("role", ["learner", "engine", "actor", "up"])
def test_a_model_folder_without_tokenizer(run: TinyRun, tmp_path: Path, role: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(run.model, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    ports = ("network.control_port", "network.weights_port", "network.announce_port", "retriever.port")
    values = (f"model.path={model}", f"run.dir={tmp_path / 'run'}", *(f"{key}=1" for key in ports))
    message = refused(role, run.config, *(argument for value in values for argument in ("--set", value)))
    assert str(model) in message
    assert "tokenizer" in message
    assert not (tmp_path / "run" / "store.sqlite").exists()


def test_beyond_loopback_keys_are_needed(run: TinyRun, tmp_path: Path) -> None:
    ports = ("network.control_port", "network.weights_port", "network.announce_port", "retriever.port")
    for role in ("up", "learner", "actor"):
        network = ["network.host=0.0.0.0", *(f"{key}=1" for key in ports)]
        sets = [argument for value in (*network, f"run.dir={tmp_path}") for argument in ("--set", value)]
        message = refused(role, run.config, *sets)
        assert "beyond loopback and needs CURVE keys" in message, role
    assert "palimpsest keys" in refused("retriever", run.index, "--address", "tcp://0.0.0.0:0")


def test_keys_are_made_once(tmp_path: Path) -> None:
    output = palimpsest("keys", tmp_path / "keys")
    assert output.status == 0
    assert f'keys = "{tmp_path}/keys"' in output.out
    assert (tmp_path / "keys" / "server.key_secret").stat().st_mode & 0o077 == 0
    assert "already holds" in refused("keys", tmp_path / "keys")
    assert palimpsest("keys", tmp_path / "keys", "--client", "node-7").status == 0
    assert (tmp_path / "keys" / "clients" / "node-7" / "client.key_secret").stat().st_mode & 0o077 == 0
    assert "already has a client node-7" in refused("keys", tmp_path / "keys", "--client", "node-7")


def test_chaos_needs_a_running_launcher(tmp_path: Path) -> None:
    assert "no launcher runs in" in refused("chaos", tmp_path)


def test_audit_exits_with_1_if_it_finds_a_problem(tmp_path: Path) -> None:
    from learner.leases.decisions import Trained
    from learner.store.run_folder import RunFolder
    from learner.store.store import Store

    assert "no run in" in refused("audit", tmp_path)
    store = Store(RunFolder(tmp_path).store)
    store.claim({"run_id": "run", "groups_per_batch": "1", "group_size": "1", "staleness_bound": "1"})
    clean = palimpsest("audit", tmp_path)
    assert (clean.status, "audit: clean" in clean.out) == (0, True)
    store.commit([Trained(0, (7,))])
    store.close()
    broken = palimpsest("audit", tmp_path, "--json")
    assert broken.status == 1, "a problem must show in the exit status"
    assert json.loads(broken.out)["problems"] == [
        "1 groups were trained that are not in the store",
    ]


def test_dry_run_starts_nothing(run: TinyRun, tmp_path: Path) -> None:
    output = palimpsest("up", run.config, "--dry-run", "--set", "run.dir=here", cwd=tmp_path)
    assert output.status == 0, output.err
    names = [line.partition(":")[0] for line in output.out.splitlines()[:4]]
    assert names == ["learner", "retriever", "engine-0", "actor-0"]
    assert output.out.splitlines()[-1].endswith(" ok, 0 warnings, 0 failed")
    assert list(tmp_path.iterdir()) == []
