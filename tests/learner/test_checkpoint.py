from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from learner.checkpoint import TrainingState, latest_checkpoint, list_checkpoints, restore_training, save_checkpoint
from learner.policy import load_policy
from learner.trainer import Trainer
from protocol.config import LearnerConfig, LossConfig, OptimizerConfig
from protocol.errors import DataError
from protocol.types import TrajectoryGroup
from tests.learner.tiny import group, save_tiny_model

CONFIG = LearnerConfig(
    num_steps=4,
    tokens_per_micro_batch=64,
    loss=LossConfig(minibatches=2),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_steps=2, weight_decay=0.01),
)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(policy=load_policy(save_tiny_model(tmp_path / "start")), config=CONFIG)


def groups_of(step: int) -> list[TrajectoryGroup]:
    return [group(10 * step, versions=(step,)), group(10 * step + 1, versions=(max(0, step - 1), step))]


def save(trainer: Trainer, root: Path, step: int, keep: int = 2) -> Path:
    state = TrainingState(step=step, num_skipped_updates=trainer.num_skipped_updates)
    return save_checkpoint(root, policy=trainer.policy, optimizer=trainer.optimizer, state=state, keep=keep)


def test_four_steps_equal_two_then_resume_then_two_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    trainer.num_skipped_updates = 7
    for step in range(2):
        trainer.train_step(groups_of(step), step=step)
    folder = save(trainer, tmp_path / "checkpoints", 2)
    noise = torch.rand(4)
    wanted = [trainer.train_step(groups_of(step), step=step) for step in (2, 3)]

    torch.manual_seed(99)
    resumed = Trainer(policy=load_policy(folder), config=CONFIG)
    state = restore_training(folder, policy=resumed.policy, optimizer=resumed.optimizer)
    assert state == TrainingState(step=2, num_skipped_updates=7)
    assert torch.equal(torch.rand(4), noise)
    found = [resumed.train_step(groups_of(step), step=step) for step in (2, 3)]

    assert [m.loss for m in found] == [m.loss for m in wanted]
    assert [m.grad_norm for m in found] == [m.grad_norm for m in wanted]
    for a, b in zip(resumed.policy.model.parameters(), trainer.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(resumed.optimizer.state[a][kind], trainer.optimizer.state[b][kind])


def test_a_checkpoint_is_a_plain_model_folder(trainer: Trainer, tmp_path: Path) -> None:
    trainer.train_step(groups_of(0), step=0)
    folder = save(trainer, tmp_path / "checkpoints", 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for found, wanted in zip(model.parameters(), trainer.policy.model.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert PreTrainedTokenizerFast.from_pretrained(folder)("w3 w1")["input_ids"] == [3, 1]
    assert not list(folder.glob("*.bin"))


def test_the_newest_are_kept_and_the_newest_complete_one_is_found(trainer: Trainer, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert latest_checkpoint(root) is None
    folders = [save(trainer, root, step, keep=2) for step in (1, 2, 10)]
    assert list_checkpoints(root) == folders[1:]
    (folders[2] / "model.safetensors").write_bytes(b"cut short")
    assert latest_checkpoint(root) == folders[1]
    with pytest.raises(DataError, match="is not complete"):
        restore_training(folders[2], policy=trainer.policy, optimizer=trainer.optimizer)
    assert save(trainer, root, 10) == latest_checkpoint(root)


def test_what_a_crash_left_is_not_counted_and_goes_with_the_next_one(trainer: Trainer, tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=f"moments of {first} must have shape"):
        restore_training(folder, policy=trainer.policy, optimizer=trainer.optimizer)


def test_keep_must_leave_one(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        save(trainer, tmp_path, 1, keep=0)
