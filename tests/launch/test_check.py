"""`palimpsest check`: each fault has its own line. Some tests run the whole command with its processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from actor.check import check_actor
from learner.launch.pointless_settings import pointless_settings
from learner.launch.preflight import preflight
from protocol.check_result import CheckResult
from protocol.config_file import load_config
from retriever.check import check_indexes
from tests.launch.tiny_run import TinyRun, make_tiny_run

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Report:
    status: int
    results: list[CheckResult]
    last: str

    def only(self, outcome: str) -> list[str]:
        """`subject: message` of the results with this outcome."""
        return [f"{each.subject}: {each.message}" for each in self.results if each.outcome == outcome]


def check(run: Path, *overrides: str) -> Report:
    """The whole command: the launcher and the processes of the other roles."""
    arguments = [argument for each in overrides for argument in ("--set", each)]
    done = subprocess.run(
        [sys.executable, "-m", "learner.launch", "check", str(run), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    lines = done.stdout.strip().splitlines()
    results = [result for line in lines if (result := CheckResult.parse(line)) is not None]
    assert len(results) == len(lines) - 1, done.stdout
    return Report(done.returncode, results, lines[-1])


def failures(run: Path, *overrides: str) -> list[str]:
    """`subject: message` of the failures that launcher, actor and retriever find; their checks run in this process."""
    config = load_config(run, overrides)
    results = [*preflight(config), *check_actor(config)]
    results += check_indexes([f"{name}={folder}" for name, folder in config.retriever.indexes.items()])
    return [f"{each.subject}: {each.message}" for each in results if each.outcome == "fail"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: TinyRun, tmp_path: Path) -> Path:
    """The run file in a copy of the folder, which the test may change."""
    return shutil.copytree(made.config.parent, tmp_path / "run") / made.config.name


def test_a_run_without_faults(run: Path) -> None:
    report = check(run)
    assert (report.status, report.only("fail"), report.only("warn")) == (0, [], [])
    subjects = [result.subject for result in report.results]
    for subject in ("config", "model.path", "run.dir", "disk", "ports", "tokenizer", "task", "prompt", "index world-1"):
        assert subject in subjects
    assert "task: unlimited questions; first question: what is " in "\n".join(report.only("ok"))
    assert not (run.parent / "run").exists(), "a check writes nothing"


def _edit(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _truncate(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_dimension(folder: Path) -> None:
    path = folder / "index" / "manifest.json"
    tree = json.loads(path.read_text())
    tree["encoder"]["dimension"] += 1
    path.write_text(json.dumps(tree))


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model": (lambda folder: shutil.rmtree(folder / "model"), "model.path: folder "),
    "no weights": (lambda folder: (folder / "model/model.safetensors").unlink(), "cannot be read: No such file"),
    "truncated weights": (_truncate, "bytes, got "),
    "bad config.json": (_edit("model/config.json", "{"), "config.json cannot be read"),
    "no tokenizer": (lambda folder: (folder / "model/tokenizer.json").unlink(), "tokenizer: no tokenizer.json"),
    "no index": (lambda folder: shutil.rmtree(folder / "index"), "index world-1: folder "),
    "no file of the index": (lambda folder: (folder / "index/vectors.npy").unlink(), "has no vectors.npy: build"),
    "index of another dimension": (_other_dimension, "shape must be (2120, "),
    "run.dir is a file": (_edit("run", "not a folder"), "is not a folder; choose another run.dir"),
}


@pytest.mark.parametrize(("damage", "message"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_faulty_file_fails(run: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(run.parent)
    assert message in "\n".join(failures(run))


def test_every_fault_is_in_its_own_line_and_the_exit_status_is_2(run: Path) -> None:
    """Faults that the launcher, the actor, the learner and the retriever find."""
    shutil.rmtree(run.parent / "index")
    report = check(run, "network.host=192.0.2.1", "task.use=qa", "learner.loss.use=no_such_module:Loss")
    assert (report.status, report.last.rpartition(", ")[2]) == (2, f"{len(report.only('fail'))} failed")
    subjects = {each.partition(":")[0] for each in report.only("fail")}
    assert subjects == {"network", "network.host", "extensions", "learner", "index world-1"}
    assert "there is no module 'no_such_module'" in "\n".join(report.only("fail"))


def test_an_invalid_config_fails(run: Path) -> None:
    report = check(run, "learner.staleness_bound=-1")
    assert report.status == 2
    assert report.only("fail") == [f"config: {run}: learner.staleness_bound: must be >= 0, got -1"]


SETTING_FAULTS = {
    "workflow.context_tokens=9999": "context_tokens: workflow.context_tokens must be <= max_position_embeddings = 256",
    "task.use=qa": "extensions: ",
    "workflow.use=no_such_module:Agent": "there is no module 'no_such_module'",
    "retriever.indexes={}": "the tool search needs a retriever",
    "learner.lora={targets=['no_proj']}": "learner.lora.targets: no weight of the model is named no_proj",
    "network.host=192.0.2.1": "is not an address of this machine",
    "network.api_key_file=nowhere": "network.api_key_file ",
}


@pytest.mark.parametrize(("override", "message"), SETTING_FAULTS.items(), ids=SETTING_FAULTS)
def test_a_faulty_setting_fails(run: Path, override: str, message: str) -> None:
    assert message in "\n".join(failures(run, override))


def test_ports_that_are_taken_or_equal_fail(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        found = failures(run, f"network.control_port={port}", "network.weights_port=7", "network.announce_port=7")
    assert f"ports: network.control_port {port}: Address already in use; choose another port, or 0" in "\n".join(found)
    assert "network.weights_port, network.announce_port are all 7" in "\n".join(found)


def test_a_gpu_that_is_not_there_fails(run: Path) -> None:
    report = check(run, "learner.device=cuda:99")
    assert "GPU: learner.device = 'cuda:99' with learner.ranks = 1 needs 100, torch finds " in report.only("fail")[0]


def test_a_server_that_does_not_respond_is_a_warning(run: Path) -> None:
    results = preflight(load_config(run, ["engine.urls=['http://127.0.0.1:9']"]))
    [warning] = [each for each in results if each.outcome == "warn"]
    assert f"{warning.subject}: {warning.message}".startswith("engine.urls: http://127.0.0.1:9 does not respond")


POINTLESS = {
    "actor.count=0": "actor.count",
    "engine.count=0": "engine.count",
    "engine.max_total_tokens=8": "engine.max_total_tokens",
    "actor.max_trajectories=1": "actor.max_trajectories",
    "learner.skip_zero_variance=true": "learner.skip_zero_variance",
    "learner.optimizer.learning_rate=0": "learner.optimizer.learning_rate",
    "learner.optimizer.warmup_steps=2": "learner.optimizer.warmup_steps",
    "learner.optimizer.final_fraction=0.5": "learner.optimizer.final_fraction",
    "learner.reference=model": "learner.reference",
    "learner.loss.kl_in=loss": "learner.loss.kl_in",
    "learner.loss.constant=7": "learner.loss.constant",
    "learner.loss.value={coefficient=1}": "learner.loss.value",
    "learner.checkpoint.every_steps=99": "learner.checkpoint.every_steps",
    "learner.checkpoint.keep_every_steps=3": "learner.checkpoint.keep_every_steps",
}


@pytest.mark.parametrize(("override", "key"), POINTLESS.items(), ids=POINTLESS)
def test_a_pointless_setting_is_named(run: Path, override: str, key: str) -> None:
    overrides = ["learner.checkpoint.every_steps=2", override]
    assert [name for name, _ in pointless_settings(load_config(run, overrides))] == [key]


def test_a_straggler_timeout_that_never_acts_is_named(run: Path) -> None:
    overrides = ["learner.straggler_timeout_s=5", "learner.staleness_bound=0"]
    assert [name for name, _ in pointless_settings(load_config(run, overrides))] == ["learner.straggler_timeout_s"]


def test_a_line_is_parsed_as_it_was_printed() -> None:
    result = CheckResult("warn", "index a b", "two  spaces\nand a line end")
    assert CheckResult.parse(str(result)) == CheckResult("warn", "index a b", "two spaces and a line end")
    assert CheckResult.parse("2026-11-24 check INFO nothing") is None
