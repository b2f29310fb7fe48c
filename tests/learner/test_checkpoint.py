from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from learner.model import export as weights
from learner.model.loading import load_policy
from learner.training import checkpoint
from learner.training.checkpoint import (
    TrainingProgress,
    latest_checkpoint,
    list_checkpoints,
    newest_folder,
    oldest_fallback_step,
    restore_checkpoint,
    save_checkpoint,
    set_aside,
)
from learner.training.checkpoint_manifest import DamagedCheckpoint
from learner.training.trainer import Trainer
from protocol.errors import DataError
from protocol.learner_config import LearnerConfig, OptimizerConfig
from protocol.types import TrajectoryGroup
from tests.learner.configs import loss_config
from tests.learner.tiny import group, save_tiny_model
from tests.store.small_disk import fill, limited_file_size, small_disk

CONFIG = LearnerConfig(
    num_steps=4,
    tokens_per_micro_batch=64,
    loss=loss_config(minibatches=2),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_steps=2, weight_decay=0.01),
)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(policy=load_policy(save_tiny_model(tmp_path / "start")), config=CONFIG)


def groups_of(step: int) -> list[TrajectoryGroup]:
    return [group(10 * step, versions=(step,)), group(10 * step + 1, versions=(max(0, step - 1), step))]


def save(
    trainer: Trainer,
    root: Path,
    step: int,
    keep: int = 2,
    keep_every_steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    guard = trainer.guard
    progress = TrainingProgress(
        step, num_skipped_updates=guard.num_skipped, num_consecutive_skips=guard.num_consecutive
    )
    return save_checkpoint(
        root,
        policy=trainer.policy,
        optimizer=trainer.optimizer,
        progress=progress,
        keep=keep,
        keep_every_steps=keep_every_steps,
        value_head=trainer.scorer.value_head,
        dtype=dtype,
    )


def test_four_steps_equal_two_steps_a_resume_and_two_steps_bit_exactly(trainer: Trainer, tmp_path: Path) -> None:
    trainer.guard.num_skipped = 7

    for step in range(2):
        trainer.train_step(groups_of(step), step=step)
    folder = save(trainer, tmp_path / "checkpoints", 2)
    noise = torch.rand(4)
    wanted = [trainer.train_step(groups_of(step), step=step) for step in (2, 3)]

    torch.manual_seed(99)
    resumed = Trainer(policy=load_policy(folder), config=CONFIG)
    progress = restore_checkpoint(folder, policy=resumed.policy, optimizer=resumed.optimizer)
    assert progress == TrainingProgress(step=2, num_skipped_updates=7)
    assert torch.equal(torch.rand(4), noise)
    found = [resumed.train_step(groups_of(step), step=step) for step in (2, 3)]

    for tag in ("learner/loss", "learner/grad_norm"):
        assert [m.values[tag] for m in found] == [m.values[tag] for m in wanted]
    for a, b in zip(resumed.policy.model.parameters(), trainer.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(resumed.optimizer.state[a][kind], trainer.optimizer.state[b][kind])


def test_a_checkpoint_is_a_hugging_face_folder(trainer: Trainer, tmp_path: Path) -> None:
    trainer.train_step(groups_of(0), step=0)
    folder = save(trainer, tmp_path / "checkpoints", 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for found, wanted in zip(model.parameters(), trainer.policy.model.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert PreTrainedTokenizerFast.from_pretrained(folder)("w3 w1")["input_ids"] == [3, 1]
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_a_bf16_checkpoint_is_served_in_bf16_and_resumed_in_fp32(trainer: Trainer, tmp_path: Path) -> None:
    trainer.train_step(groups_of(0), step=0)
    folder = save(trainer, tmp_path / "checkpoints", 1, dtype=torch.bfloat16)
    served = AutoModelForCausalLM.from_pretrained(folder)
    assert served.dtype is torch.bfloat16
    resumed = Trainer(policy=load_policy(folder), config=CONFIG)
    restore_checkpoint(folder, policy=resumed.policy, optimizer=resumed.optimizer)
    masters = list(trainer.policy.model.parameters())
    for found, wanted in zip(served.parameters(), masters, strict=True):
        assert torch.equal(found, wanted.bfloat16())
    for found, wanted in zip(resumed.policy.model.parameters(), masters, strict=True):
        assert torch.equal(found, wanted)


def test_the_newest_checkpoints_are_kept_and_the_newest_complete_one_is_found(trainer: Trainer, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert latest_checkpoint(root) is None
    folders = [save(trainer, root, step, keep=2) for step in (1, 2, 10)]
    assert list_checkpoints(root) == folders[1:]
    (folders[2] / "model.safetensors").write_bytes(b"cut short")
    assert latest_checkpoint(root) == folders[1]
    with pytest.raises(DataError, match=r"model\.safetensors must have 83624 bytes, got 9"):
        restore_checkpoint(folders[2], policy=trainer.policy, optimizer=trainer.optimizer)
    assert save(trainer, root, 10) == latest_checkpoint(root)


def flip_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 1000)
    data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip_bytes, "the content of {name} does not have its checksum"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"{name} must have \d+ bytes, got \d+"),
    "empty": (lambda path: path.write_bytes(b""), r"{name} must have \d+ bytes, got 0"),
    "missing": (Path.unlink, "{name} cannot be read: No such file or directory"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "{name} "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named_before_anything_is_loaded(trainer: Trainer, tmp_path: Path, damage: str) -> None:
    trainer.train_step(groups_of(0), step=0)
    whole = save(trainer, tmp_path / "checkpoints", 1)
    names = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.name != "state.json"]
    assert len([name for name in names if name.endswith(".safetensors")]) == 2
    change, message = DAMAGES[damage]
    other = Trainer(policy=load_policy(whole), config=CONFIG)
    before = [parameter.clone() for parameter in other.policy.model.parameters()]
    for name in names:
        folder = shutil.copytree(whole, tmp_path / "torn" / "step-00000001")
        change(folder / name)
        with pytest.raises(DamagedCheckpoint, match=rf"checkpoint {folder}: .*" + message.format(name=name)):
            restore_checkpoint(folder, policy=other.policy, optimizer=other.optimizer)
        shutil.rmtree(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, other.policy.model.parameters(), strict=True))
    restore_checkpoint(whole, policy=other.policy, optimizer=other.optimizer)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"training": {"step": 1}, "files": {}}', '{"training": 3}', "\xff"]
)
def test_a_bad_manifest_is_damage(trainer: Trainer, tmp_path: Path, text: str) -> None:
    folder = save(trainer, tmp_path, 1)
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        restore_checkpoint(folder, policy=trainer.policy, optimizer=trainer.optimizer)


def test_a_damaged_checkpoint_is_renamed_and_the_older_one_is_next(trainer: Trainer, tmp_path: Path) -> None:
    folders = [save(trainer, tmp_path, step) for step in (1, 2)]
    assert newest_folder(tmp_path) == folders[1]
    assert set_aside(folders[1]).name == "damaged-step-00000002"
    assert newest_folder(tmp_path) == folders[0]
    assert set_aside(save(trainer, tmp_path, 2)).name == "damaged-step-00000002-2"


def test_the_oldest_fallback_is_the_start_until_all_checkpoints_exist(trainer: Trainer, tmp_path: Path) -> None:
    found = []
    for step in (2, 4, 6):
        save(trainer, tmp_path, step, keep=2, keep_every_steps=2)
        found.append(oldest_fallback_step(tmp_path, keep=2))
    assert found == [0, 2, 4]


@pytest.mark.parametrize("num_bytes", [0, 2000, 50_000, 90_000])
def test_a_save_without_room_removes_what_it_wrote_and_keeps_the_older_one(
    trainer: Trainer, tmp_path: Path, num_bytes: int
) -> None:
    root = tmp_path / "checkpoints"
    older = save(trainer, root, 1)
    with limited_file_size(num_bytes), pytest.raises(OSError, match="File too large"):
        save(trainer, root, 2)
    assert list(root.iterdir()) == [older]
    assert save(trainer, root, 2) == latest_checkpoint(root)


@pytest.mark.parametrize("part", ["nothing", "training"])
def test_a_full_disk_ends_a_save_with_an_os_error(trainer: Trainer, tmp_path: Path, part: str) -> None:
    """There is room for nothing, or for training/ but not for model.safetensors."""
    with small_disk(tmp_path / "disk", num_bytes=1 << 20) as disk:
        older = save(trainer, disk, 1)
        num_bytes = sum(path.stat().st_size for path in (older / "training").iterdir())
        ballast = fill(disk, num_bytes_left=num_bytes + (40 << 10) if part == "training" else 0)
        with pytest.raises(OSError, match=r"(?i)no space left on device"):
            save(trainer, disk, 2)
        assert sorted(disk.iterdir()) == [ballast, older]
        ballast.unlink()
        assert save(trainer, disk, 2) == latest_checkpoint(disk)


def test_multiples_of_keep_every_steps_are_never_deleted(trainer: Trainer, tmp_path: Path) -> None:
    for step in range(1, 9):
        save(trainer, tmp_path / "checkpoints", step, keep=1, keep_every_steps=3)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [child.name for child in kept] == [f"step-0000000{step}" for step in (3, 6, 8)]


class Killed(BaseException):
    """Simulates a kill: a BaseException, which `except Exception` does not catch."""


def test_a_kill_before_any_file_operation_leaves_a_complete_checkpoint(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills a save at its first, second ... file operation until it completes; the newest checkpoint can be resumed."""
    trainer.train_step(groups_of(0), step=0)
    whole = save(trainer, tmp_path / "whole", 0).parent
    torn = shutil.copytree(whole / "step-00000000", whole / "step-00000001")
    (torn / "model.safetensors").unlink()
    found: list[str] = []
    for number in itertools.count():
        root = shutil.copytree(whole, tmp_path / f"attempt-{number}")
        with monkeypatch.context() as patched:
            raise_before_file_operation(number, patched)
            with contextlib.suppress(Killed, OSError):
                save(trainer, root, 1, keep=1)
                break
        latest = latest_checkpoint(root)
        assert latest is not None
        restore_checkpoint(latest, policy=trainer.policy, optimizer=trainer.optimizer)
        found.append(latest.name)
        assert save(trainer, root, 1, keep=1) == latest_checkpoint(root)
        assert [child.name for child in root.iterdir()] == ["step-00000001"]
        shutil.rmtree(root)
    assert found == sorted(found)
    assert set(found) == {"step-00000000", "step-00000001"}
    assert len(found) > 15


def raise_before_file_operation(number: int, patched: pytest.MonkeyPatch) -> None:
    """Patches file operations: number `number` from now, counted from 0, raises Killed instead."""
    left = number

    def before(operation: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return operation(*args, **kwargs)

        return run

    for owner, name in (
        (Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (Path, "write_text"),
        (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "rename"),
        (shutil, "copyfile"), (weights, "save_file"), (checkpoint, "save_training_tensors"),
    ):  # fmt: skip
        patched.setattr(owner, name, before(getattr(owner, name)))


def test_unfinished_checkpoints_are_ignored_and_removed_by_the_next_save(trainer: Trainer, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    whole = save(trainer, root, 1)
    shutil.copytree(whole, root / ".writing-step-00000002")
    torn = shutil.copytree(whole, root / "step-00000003")
    (torn / "state.json").unlink()
    assert latest_checkpoint(root) == whole
    assert save(trainer, root, 3, keep=1) == latest_checkpoint(root) == torn
    assert sorted(child.name for child in root.iterdir()) == ["step-00000003"]


def test_a_checkpoint_of_another_model_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    trainer.train_step(groups_of(0), step=0)
    folder = save(trainer, tmp_path / "checkpoints", 1)
    first, parameter = next(iter(trainer.policy.model.named_parameters()))
    parameter.data = parameter.data[:-1].clone()
    with pytest.raises(DataError, match=rf"{first} must have shape \(47, 32\), got \(48, 32\)"):
        restore_checkpoint(folder, policy=trainer.policy, optimizer=trainer.optimizer)


def test_keep_must_be_at_least_one(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        save(trainer, tmp_path, 1, keep=0)
