"""`palimpsest eval RUN` through the command line: it starts an engine and a retriever, stops them, and resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from protocol.evaluation import EvaluationFolder
from tests.launch.running import RUN_TIMEOUT_S, launched, pids, until
from tests.launch.tiny_run import TinyRun, make_tiny_run

SAMPLED = ("--temperature", "1", "--samples", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny: TinyRun) -> Path:
    """The folder of a finished run of two steps."""
    log = tiny.run_dir.with_name("up.log")
    with launched("up", tiny.config, "--quiet", log=log) as process:
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    return tiny.run_dir


def evaluate(log: Path, *arguments: str | Path, status: int = 0) -> str:
    """Runs `palimpsest eval ARGUMENTS` to its end and returns what it printed."""
    with launched("eval", *arguments, log=log) as process:
        assert process.wait(timeout=RUN_TIMEOUT_S) == status, log.read_text()
    return log.read_text()


def samples(folder: EvaluationFolder) -> list[dict[str, Any]]:
    """The complete lines of samples.jsonl."""
    try:
        text = folder.samples.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def in_order(folder: EvaluationFolder) -> list[dict[str, Any]]:
    return sorted(samples(folder), key=lambda line: (line["cursor"], line["sample"]))


def wait_until_ended(processes: dict[str, int]) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while any(is_running(pid) for pid in processes.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_config_without_a_run_evaluates_model_path(tiny: TinyRun, tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    printed = evaluate(
        tmp_path / "log", tiny.config, "--output", output, "--limit", "4", "--set", f"run.dir={tmp_path}"
    )
    report = EvaluationFolder(output).read_report()
    assert report.complete
    assert report.versions == {"tiny:step-0": 4}
    assert f"evaluating model.path, {tiny.model}, of tiny" in printed
    assert "tiny step 0" in printed
    assert str(output / "samples.jsonl") in printed
    assert not (output / "processes.json").exists()
    assert not (output / "engine-token").exists()


def without_cache(value: Any) -> Any:
    """Drops `num_cached_tokens`, which depends on the other requests of the engine."""
    if isinstance(value, dict):
        return {key: without_cache(each) for key, each in value.items() if "num_cached_tokens" not in key}
    return [without_cache(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_report(finished: Path, tmp_path: Path) -> None:
    limit = ("--limit", "150", "--concurrency", "2", *SAMPLED)
    whole = EvaluationFolder(tmp_path / "whole")
    evaluate(tmp_path / "whole.log", finished, "--output", whole.root, *limit)
    assert whole.read_report().versions == {"tiny:step-2": 300}
    killed, log = EvaluationFolder(tmp_path / "killed"), tmp_path / "killed.log"
    for num_lines in (20, 150):
        with launched("eval", finished, "--output", killed.root, *limit, log=log) as process:
            until(lambda num_lines=num_lines: len(samples(killed)) >= num_lines, process, log)
            processes = pids(killed.root)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        wait_until_ended(processes)
        assert num_lines <= len(samples(killed)) < 300
    kept = samples(killed)
    evaluate(log, finished, "--output", killed.root, *limit)
    assert samples(killed)[: len(kept)] == kept
    assert without_cache(in_order(killed)) == without_cache(in_order(whole))
    assert without_cache(json.loads(killed.report.read_bytes())) == without_cache(json.loads(whole.report.read_bytes()))


@pytest.mark.slow
def test_ctrl_c_stops_every_process_and_keeps_the_samples(finished: Path, tmp_path: Path) -> None:
    folder, log = EvaluationFolder(tmp_path / "evaluation"), tmp_path / "log"
    limit = ("--limit", "5000", "--concurrency", "2")
    with launched("eval", finished, "--output", folder.root, *limit, log=log) as process:
        until(lambda: len(samples(folder)) >= 10, process, log)
        processes = pids(folder.root)
        assert set(processes) == {"engine", "retriever", "evaluator"}
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 130, log.read_text()
    assert not any(is_running(pid) for pid in processes.values())
    assert "eval: stopped; the same command continues" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not folder.read_report().complete
    assert len(samples(folder)) >= 10


@pytest.mark.slow
def test_checkpoints_and_defaults(finished: Path, tmp_path: Path) -> None:
    """The default folder is in the run and has the settings in its name; other settings in one folder are refused."""
    log = tmp_path / "log"
    evaluate(log, finished, "--limit", "2", *SAMPLED)
    assert EvaluationFolder(finished / "evaluations" / "step-2-eval-t1-x2").read_report().complete
    assert not list((finished / "evaluations" / "step-2-eval-t1-x2").glob("model/*"))
    evaluate(log, finished, "--limit", "2", "--checkpoint", "0", "--split", "train")
    folder = EvaluationFolder(finished / "evaluations" / "step-0-train-greedy")
    assert folder.read_report().versions == {"tiny:step-0": 2}
    assert {line["id"] for line in samples(folder)} == {"world-1/0", "world-1/1"}
    printed = evaluate(log, finished, "--limit", "2", "--checkpoint", "7", status=2)
    assert "has no checkpoint of step 7; it has 2; --checkpoint 0 evaluates model.path" in printed
    printed = evaluate(log, finished, "--limit", "2", "--output", folder.root, status=2)
    assert "evaluation.policy: it has" in printed
    evaluate(log, finished, "--limit", "2", "--output", folder.root, "--overwrite")
    assert folder.read_report().versions == {"tiny:step-2": 2}
    printed = evaluate(log, finished, "--live", status=2)
    assert "does not run now: without --live, its newest checkpoint is evaluated" in printed


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_evaluated(finished: Path, tmp_path: Path) -> None:
    """A run's only checkpoint is damaged: model.path is not evaluated in its place."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("evaluations"))
    weights = run / "checkpoints" / "step-00000002" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    printed = evaluate(tmp_path / "log", run, status=2)
    assert "the content of model.safetensors does not have its checksum" in printed
    weights.write_bytes(content[:-1])
    printed = evaluate(tmp_path / "log", run, status=2)
    assert "has no checkpoint; it has none; checkpoint" in printed
    assert "model.safetensors must have" in printed


@pytest.mark.slow
def test_failed_samples_give_status_1_and_their_reason(finished: Path, tmp_path: Path) -> None:
    """The reward of this config raises for every sample."""
    code = "from palimpsest import Reward\n\n\nclass Broken(Reward):\n    async def score(self, *_):\n        1 / 0\n"
    (tmp_path / "broken_reward.py").write_text(code)
    log, output = tmp_path / "log", tmp_path / "evaluation"
    options = ("--limit", "2", "--output", output, "--set", "reward.use=broken_reward:Broken")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with launched("eval", finished, *options, log=log, environment=environment) as process:
        assert process.wait(timeout=RUN_TIMEOUT_S) == 1, log.read_text()
    printed = log.read_text()
    assert "2 failed: broken_reward:Broken raised ZeroDivisionError" in printed
    assert "none: no sample is valid" in printed
    assert "0.0000" not in printed


@pytest.mark.slow
def test_a_running_run_is_evaluated_beside_it_and_live(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    up_log, log = tmp_path / "up.log", tmp_path / "eval.log"
    with launched("up", run.config, "--quiet", "--set", "learner.num_steps=100000", log=up_log) as up:
        until(lambda: any((run.run_dir / "checkpoints").glob("step-*")), up, up_log)
        evaluate(log, run.run_dir, "--limit", "8", *SAMPLED)
        (folder,) = map(EvaluationFolder, (run.run_dir / "evaluations").iterdir())
        (version,) = folder.read_report().versions
        assert version.startswith("tiny:step-")
        evaluate(log, run.run_dir, "--live", "--limit", "8", "--mixed-versions")
        live = EvaluationFolder(run.run_dir / "evaluations" / "live-eval-greedy").read_report()
        assert all(version.count(":") == 2 for version in live.versions), "publications state run:publication:version"
        assert sum(live.versions.values()) >= 8
        up.send_signal(signal.SIGTERM)
        up.wait(timeout=RUN_TIMEOUT_S)
    assert up_log.read_text().count("Traceback") == 0


def test_options_that_exclude_each_other(tiny: TinyRun, tmp_path: Path) -> None:
    printed = evaluate(tmp_path / "log", tiny.config, "--live", "--engine", "http://127.0.0.1:1", status=2)
    assert "--checkpoint, --live and --engine exclude each other" in printed


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    printed = evaluate(tmp_path / "log", tmp_path, status=2)
    assert f"{tmp_path} is not the folder of a run: it has no config.json" in printed
