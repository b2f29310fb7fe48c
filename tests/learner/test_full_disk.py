"""Metrics and checkpoints on a full disk: the learner continues, and writes again when there is room."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from learner.launch.step_log import StepLog
from learner.metrics.jsonl import LineWriter, last_step
from learner.metrics.tensorboard import TensorBoardWriter
from learner.model.loading import load_policy
from learner.training.checkpoint import latest_checkpoint, list_checkpoints
from learner.training.checkpointer import Checkpointer
from learner.training.trainer import Trainer
from protocol.learner_config import CheckpointConfig, LearnerConfig
from tests.launch.metrics_lines import metrics_line
from tests.learner.tiny import save_tiny_model
from tests.store.small_disk import fill, limited_file_size, small_disk

WAIT_S = 30.0


@pytest.mark.parametrize("num_bytes", [0, 10, 1000])
def test_lines_without_room_are_written_later(tmp_path: Path, num_bytes: int, caplog: pytest.LogCaptureFixture) -> None:
    """The limits end the first line at its start, within it, and within a later line."""
    path = tmp_path / "metrics.jsonl"
    lines = LineWriter(path)
    with limited_file_size(num_bytes):
        for step in range(5):
            lines.append(metrics_line(step, 0.1) + "\n")
    assert caplog.text.count("its lines are kept until there is room") == 1
    lines.append(metrics_line(5, 0.1) + "\n")
    steps = StepLog(path)
    steps.refresh()
    assert sorted(steps.by_step) == [0, 1, 2, 3, 4, 5]
    assert last_step(path) == 5


def test_lines_are_kept_while_a_disk_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_bytes=1 << 20) as disk:
        ballast = fill(disk)
        lines = LineWriter(disk / "metrics.jsonl")
        lines.append(metrics_line(0, 0.1) + "\n")
        assert last_step(disk / "metrics.jsonl") == -1
        ballast.unlink()
        lines.flush()
        assert last_step(disk / "metrics.jsonl") == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_tensorboard_events_without_room_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error of TensorBoard's own thread does not reach the caller; the events before it can be read."""
    writer = TensorBoardWriter(tmp_path, reopen_after_s=0.0)
    with limited_file_size(0):
        for step in range(20):
            writer.scalars({"reward/mean": 0.5}, step=step)
            writer.text("trajectories/best", "x" * 10_000, step=step)
        writer.close()
    assert "TensorBoard events cannot be written and are dropped until there is room" in caplog.text
    writer.scalars({"reward/mean": 0.25}, step=20)
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    events = EventAccumulator(str(newest)).Reload()
    tags = events.Tags()["scalars"]
    assert len(tags) == 1
    assert [(event.step, event.value) for event in events.Scalars(tags[0])] == [(20, 0.25)]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    torch.set_num_threads(1)
    config = LearnerConfig(num_steps=4, tokens_per_micro_batch=64)
    return Trainer(policy=load_policy(save_tiny_model(tmp_path / "start")), config=config)


def test_a_checkpoint_without_room_is_tried_again_at_the_next_step(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, saved = tmp_path / "checkpoints", []
    failed: list[int] = []
    config = CheckpointConfig(every_steps=2, keep=2)
    saver = Checkpointer(
        trainer,
        root,
        config=config,
        dtype=torch.float32,
        on_saved=saved.append,
        on_failed=lambda step, error: failed.append(step),
    )
    for step in range(1, 8):
        if saver.is_due(step):
            with limited_file_size(2000 if step in (4, 5) else 1 << 30):
                assert saver.try_save(step) == (step not in (4, 5))
    assert [folder.name for folder in list_checkpoints(root)] == ["step-00000002", "step-00000006"]
    assert (saved, failed) == ([0, 2], [4, 5])
    assert caplog.text.count("training continues, and the next step tries again") == 2


def test_the_last_checkpoint_waits_for_room(trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", num_bytes=1 << 20) as disk:
        ballast = fill(disk)
        errors: list[OSError] = []
        saver = Checkpointer(
            trainer,
            disk,
            config=CheckpointConfig(),
            dtype=torch.float32,
            on_saved=lambda _: None,
            on_failed=lambda step, error: errors.append(error),
            retry_s=0.05,
        )
        saving = threading.Thread(target=saver.save_last, args=(7,))
        saving.start()
        with caplog.at_level("ERROR"):
            while "waiting until there is room" not in caplog.text:
                saving.join(0.01)
                assert saving.is_alive()
        ballast.unlink()
        saving.join(WAIT_S)
        newest = latest_checkpoint(disk)
        assert newest is not None
        assert newest.name == "step-00000007"
        assert caplog.text.count("waiting until there is room") == 1
        assert all("No space left on device" in str(error) for error in errors)
        assert errors
