"""Replays of recorded batches: bit-exact after a kill, equal on two ranks, refused for another source or config."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.build import run_replay
from learner.metrics.drift import Drift, Mean
from learner.store.run_folder import RunFolder
from protocol.codec import pack_groups, unpack_groups
from protocol.config_file import load_config
from protocol.errors import DataError, DivergenceError, DriftError, MalformedMessage
from tests.learner.recorded import groups_of, record_run, replay_config

ROOT = Path(__file__).resolve().parents[2]
KILL_AFTER_5 = """
import os, signal, sys
from pathlib import Path
from learner.build import run_replay
from learner.training.trainer import Trainer
from protocol.config_file import load_config
train_step = Trainer.train_step
def killed(self, groups, *, step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, groups, step=step)
Trainer.train_step = killed
run_replay(load_config(Path(sys.argv[1]), [f"run.dir={sys.argv[3]}"]), Path(sys.argv[2]))
"""


def tensors_of(out: Path, step: int = 10) -> dict[str, torch.Tensor]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    files = [folder / "model.safetensors", *sorted((folder / "training").glob("*.safetensors"))]
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in RunFolder(out).metrics.read_text().splitlines()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_ten_steps_equal_five_steps_a_kill_and_five_steps_bit_exactly(tmp_path: Path) -> None:
    source = record_run(tmp_path / "source", num_steps=10)
    path, config = replay_config(tmp_path)
    run_replay(config, source)

    killed = tmp_path / "killed"
    arguments = [sys.executable, "-c", KILL_AFTER_5, str(path), str(source), str(killed)]
    process = subprocess.run(arguments, env=environment(), cwd=tmp_path, check=False)
    assert process.returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics_of(killed)] == list(range(5))
    assert not (killed / "checkpoints" / "step-00000005").exists()
    run_replay(load_config(path, [f"run.dir={killed}"]), source)

    wanted, found = tensors_of(config.run.dir), tensors_of(killed)
    assert wanted.keys() == found.keys()
    assert any("exp_avg" in name for name in wanted)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    steps = {line["step"]: line["learner/loss"] for line in metrics_of(killed)}
    assert steps == {line["step"]: line["learner/loss"] for line in metrics_of(config.run.dir)}
    assert len(set(steps.values())) > 5


@pytest.mark.slow
def test_a_replay_on_two_ranks_equals_one_rank(tmp_path: Path) -> None:
    source = record_run(tmp_path / "source", num_steps=3)
    path, config = replay_config(tmp_path)
    run_replay(config, source)
    out = tmp_path / "two"
    overrides = ("--set", f"run.dir={out}", "--set", "learner.ranks=2")
    arguments = [sys.executable, "-m", "learner.launch", "learner", str(path), "--replay", str(source), *overrides]
    subprocess.run(arguments, env=environment(), cwd=tmp_path, check=True)
    for one, two in zip(metrics_of(config.run.dir), metrics_of(out), strict=True):
        for tag in (
            "learner/loss",
            "learner/grad_norm",
            "policy/entropy",
            "policy/kl_behavior",
            "policy/clip_fraction",
        ):
            assert two[tag] == pytest.approx(one[tag], rel=1e-4, abs=1e-7), tag
        assert two["learner/trained_tokens"] == one["learner/trained_tokens"]
    wanted, found = (load_file(each / "checkpoints/step-00000003/model.safetensors") for each in (config.run.dir, out))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_replay_folder_of_another_source_or_config_is_refused(tmp_path: Path) -> None:
    source = record_run(tmp_path / "source", num_steps=2)
    path, config = replay_config(tmp_path, "learner.num_steps=2", "learner.optimizer.schedule=constant")
    run_replay(config, source)
    other = load_config(
        path, ["learner.num_steps=2", "learner.optimizer.schedule=constant", "learner.loss.clip_low=0.1"]
    )
    with pytest.raises(DataError, match=r"another replay: learner\.loss\.clip_low: the run has no value, "):
        run_replay(other, source)
    with pytest.raises(DataError, match="already contains a run"):
        run_replay(load_config(path, [f"run.dir={source}"]), source)


def test_check_drift_changes_no_weight_and_reports_the_mismatch(tmp_path: Path) -> None:
    """The recorded log-probs are random: the mismatch is large and may differ between ages and contexts."""
    source = record_run(tmp_path / "source", num_steps=2)
    _, config = replay_config(tmp_path, "learner.num_steps=2", "learner.check_drift=true")
    with suppress(DriftError):
        run_replay(config, source)
    assert "by age 0: " in (config.run.dir / "drift.txt").read_text()
    start = load_file(config.model.path / "model.safetensors")
    for name, tensor in load_file(config.run.dir / "checkpoints/step-00000002/model.safetensors").items():
        assert torch.equal(tensor, start[name])


def means(*values: float, num_tokens: int = 1000) -> dict[int, Mean]:
    return {key: Mean(value, num_tokens) for key, value in enumerate(values)}


@pytest.mark.parametrize(
    ("first", "last", "by_age", "by_context", "flat"),
    [
        (1e-7, 9e-6, means(1e-8, 0.0, 5e-6), means(0.0), True),
        (1e-3, 1.5e-3, means(1e-3, 1.9e-3), {}, True),
        (1e-3, 2.5e-3, {}, {}, False),
        (1e-3, math.nan, {}, {}, False),
        (math.nan, math.nan, {}, {}, False),
        (1e-3, 1e-3, means(1e-4, 1e-3), {}, False),
        (1e-3, 1e-3, means(1e-4, 1e-3, num_tokens=50), {}, True),
        (1e-3, 1e-3, means(1e-3), means(1e-3, 4e-3), False),
    ],
)
def test_drift_is_flat_if_it_rises_with_neither_step_nor_age_nor_context(
    first: float, last: float, by_age: dict[int, Mean], by_context: dict[int, Mean], flat: bool
) -> None:
    assert Drift(Mean(first, 1000), Mean(last, 1000), by_age, by_context).is_flat is flat


def test_drift_is_read_from_the_last_line_of_each_step(tmp_path: Path) -> None:
    rows = [
        {"step": step, "policy/kl_behavior": kl, "learner/trained_tokens": num,
         "policy/kl_behavior_age_0": kl, "tokens_by_age": {"0": num}, "tokens_by_context": {}}
        for step, kl, num in [(0, 9.0, 1), (0, 1.0, 10), (1, 2.0, 20), (2, 4.0, 30)]
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Drift.read(tmp_path / "metrics.jsonl")
    assert (found.first, found.last) == (Mean(1.0, 10), Mean(4.0, 30))
    assert found.by_age == {0: Mean((10 + 40 + 120) / 60, 60)}


def test_drift_ignores_steps_that_computed_no_token(tmp_path: Path) -> None:
    """Such a step of an earlier start, without the drift check, has trained tokens but no mean over them."""
    computed = {"policy/kl_behavior": 1.0, "policy/kl_behavior_age_0": 1.0, "policy/kl_behavior_context_0": 1.0}
    counts = {"learner/trained_tokens": 10, "tokens_by_age": {"0": 10}, "tokens_by_context": {"0": 10}}
    rows = [{"step": 0, **counts}, {"step": 1, **counts, **computed}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Drift.read(tmp_path / "metrics.jsonl")
    assert (found.first, found.last) == (Mean(0.0, 0), Mean(1.0, 10))
    assert found.by_age == found.by_context == {0: Mean(1.0, 10)}


def test_repeated_non_finite_updates_end_the_run_and_save_the_batch(tmp_path: Path) -> None:
    source = record_run(tmp_path / "source", num_steps=2)
    optimizer = ("learning_rate=1e30", "schedule=constant", "max_consecutive_skips=2")
    _, config = replay_config(tmp_path, "learner.num_steps=2", *(f"learner.optimizer.{each}" for each in optimizer))
    with pytest.raises(DivergenceError, match=r"max_consecutive_skips is 2.*non-finite-step-1\.groups"):
        run_replay(config, source)
    kept = unpack_groups((config.run.dir / "non-finite-step-1.groups").read_bytes())
    assert [each.cursor for each in kept] == [each.cursor for each in groups_of(1)]


@pytest.mark.slow
def test_all_ranks_end_with_the_exit_status_of_the_first_that_fails(tmp_path: Path) -> None:
    """Status 3 means that a restart would not help."""
    source = record_run(tmp_path / "source", num_steps=1)
    path, _ = replay_config(tmp_path)
    optimizer = ("learning_rate=1e30", "schedule=constant", "warmup_steps=0", "max_consecutive_skips=1")
    overrides = [f"--set=learner.optimizer.{each}" for each in optimizer]
    arguments = [sys.executable, "-m", "learner.launch", "learner", str(path), "--replay", str(source), *overrides]
    done = subprocess.run(
        [*arguments, "--set=learner.ranks=2"],
        env=environment(),
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "error: the last 1 updates" in done.stderr
    assert "Traceback" not in done.stderr


def test_packed_groups_are_read_back_and_truncated_bytes_are_refused() -> None:
    groups = groups_of(3)
    data = pack_groups(groups)
    for wanted, found in zip(groups, unpack_groups(data), strict=True):
        assert (wanted.cursor, wanted.run_id) == (found.cursor, found.run_id)
        for a, b in zip(wanted.contexts(), found.contexts(), strict=True):
            assert a.policy_versions == b.policy_versions
            assert all(
                getattr(a, name).tobytes() == getattr(b, name).tobytes()
                for name in ("token_ids", "loss_mask", "behavior_logprobs")
            )
    with pytest.raises(MalformedMessage):
        unpack_groups(data[:-1])
