"""The command as a user runs it: instant help, and bad input ends with one sentence and exit status 2."""

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
class Said:
    status: int
    out: str
    err: str


def palimpsest(*arguments: str | Path, cwd: Path | None = None) -> Said:
    done = subprocess.run(
        [sys.executable, "-m", "learner.launch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Said(done.returncode, done.stdout, done.stderr)


def refused(*arguments: str | Path, cwd: Path | None = None) -> str:
    """The sentence on stderr; nothing else may be there but the role's log lines."""
    said = palimpsest(*arguments, cwd=cwd)
    assert said.status == 2, said
    *log, last = said.err.strip().splitlines()
    assert last.startswith("error: "), said.err
    assert not any("Traceback" in line or line.startswith("error:") for line in log), said.err
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
    """What `palimpsest ARGUMENTS --help` prints, and which heavy modules it has imported."""
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
    said = help_of()
    assert "HEAVY []" in said
    for name in ("demo", "up", "learner", "actor", "engine", "retriever", "index", "eval", "audit", "chaos", "keys"):
        assert f"\n  {name} " in said


@pytest.mark.parametrize("name", ["demo", "up", "learner", "actor", "engine", "retriever", "index", "eval", "audit"])
def test_every_command_has_help(name: str) -> None:
    said = help_of(name)
    assert f"Usage: palimpsest {name} " in said
    assert "HEAVY []" in said


def test_unknown_commands_and_options() -> None:
    said = palimpsest("trian")
    assert (said.status, "No such command 'trian'" in said.err) == (2, True)
    said = palimpsest("up", "run.toml", "--fast")
    assert (said.status, "No such option" in said.err) == (2, True)


@pytest.mark.parametrize("role", ["up", "learner", "actor", "engine", "eval"])
def test_an_unknown_config_key(run: TinyRun, tmp_path: Path, role: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "m"\n[task]\nkind = "toy"\nworlds = [1]\n[learner]\nclip = 1\n')
    said = refused(role, path)
    assert said.startswith(f"{path}: learner.clip: unknown key; known here: num_steps, groups_per_batch, ")


def test_a_bad_value(run: TinyRun) -> None:
    said = refused("learner", run.config, "--set", "learner.staleness_bound=-1")
    assert "learner.staleness_bound: Input should be greater than or equal to 0, got -1" in said


@pytest.mark.parametrize("role", ["up", "learner"])
def test_a_config_that_is_not_there(tmp_path: Path, role: str) -> None:
    assert refused(role, tmp_path / "no.toml") == f"config {tmp_path}/no.toml cannot be read: No such file or directory"


def test_a_corpus_line_without_text(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": "red"}\n{"id": "b"}\n')
    said = refused("index", corpus, "--out", tmp_path / "index", "--encoder", "bow")
    assert f"{corpus}" in said
    assert "2" in said
    assert "text" in said
    assert not (tmp_path / "index").exists()


def test_an_index_made_with_another_encoder(run: TinyRun) -> None:
    said = refused("retriever", run.index, "--encoder", run.model, "--address", "tcp://127.0.0.1:0")
    assert "another encoder" in said
    assert str(run.index) in said


def test_an_unreachable_engine(run: TinyRun) -> None:
    said = refused("engine", run.config, "--attach", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1" in said
    assert "start it" in said
    said = refused("eval", run.config, "--engine", "http://127.0.0.1:1", "--questions", "1")
    assert "engine http://127.0.0.1:1 does not answer" in said
    assert "start it, or correct --engine" in said


def test_a_port_in_use(run: TinyRun, taken_port: int) -> None:
    address = f"tcp://127.0.0.1:{taken_port}"
    assert f"cannot listen on {address}" in refused("retriever", run.index, "--address", address)
    assert "network.control_port and network.weights_port" in refused("learner", run.config)
    ports = {"control_port": taken_port, "weights_port": 1, "announce_port": 1}
    sets = [argument for key, port in ports.items() for argument in ("--set", f"network.{key}={port}")]
    said = refused("learner", run.config, *sets)
    assert f"cannot listen on {address}: Address already in use" in said
    assert str(taken_port) in refused("engine", run.config, "--port", str(taken_port))


@pytest.mark.parametrize("role", ["learner", "engine", "actor", "up"])
def test_a_model_folder_without_tokenizer(run: TinyRun, tmp_path: Path, role: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(run.model, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    said = refused(role, run.config, "--set", f"model.path={model}", "--set", f"run.dir={tmp_path / 'run'}")
    assert str(model) in said
    assert "tokenizer" in said
    assert not (tmp_path / "run" / "store.sqlite").exists()


def test_beyond_loopback_keys_are_needed(run: TinyRun, tmp_path: Path) -> None:
    for role in ("up", "learner", "actor"):
        network = ["network.host=0.0.0.0", *(f"network.{key}_port=1" for key in ("control", "weights", "announce"))]
        sets = [argument for value in (*network, f"run.dir={tmp_path}") for argument in ("--set", value)]
        said = refused(role, run.config, *sets)
        assert "beyond loopback and needs CURVE keys" in said, role
    assert "palimpsest keys" in refused("retriever", run.index, "--address", "tcp://0.0.0.0:0")


def test_keys_are_made_once(tmp_path: Path) -> None:
    said = palimpsest("keys", tmp_path / "keys")
    assert said.status == 0
    assert f'keys = "{tmp_path}/keys"' in said.out
    assert (tmp_path / "keys" / "server.key_secret").stat().st_mode & 0o077 == 0
    assert "already holds" in refused("keys", tmp_path / "keys")
    assert palimpsest("keys", tmp_path / "keys", "--client", "node-7").status == 0
    assert (tmp_path / "keys" / "clients" / "node-7" / "client.key_secret").stat().st_mode & 0o077 == 0
    assert "already has a client node-7" in refused("keys", tmp_path / "keys", "--client", "node-7")


def test_chaos_needs_a_run_that_goes_on(tmp_path: Path) -> None:
    assert "no launcher runs in" in refused("chaos", tmp_path)


def test_audit(tmp_path: Path) -> None:
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
    assert broken.status == 1, "a broken promise must be seen in the exit status"
    assert json.loads(broken.out)["problems"] == [
        "1 groups were trained that are not in the store",
    ]


def test_dry_run_starts_nothing(run: TinyRun, tmp_path: Path) -> None:
    said = palimpsest("up", run.config, "--dry-run", "--set", "run.dir=here", cwd=tmp_path)
    assert said.status == 0, said.err
    names = [line.partition(":")[0] for line in said.out.splitlines()]
    assert names == ["learner", "retriever", "engine-0", "actor-0"]
    assert list(tmp_path.iterdir()) == []
