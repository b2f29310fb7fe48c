"""Writes the checkpoints of a run at their steps. A checkpoint that cannot be written does not end the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from learner.store.disk_room import wait_for_room
from learner.training.checkpoint import TrainingProgress, oldest_fallback_step, save_checkpoint
from learner.training.trainer import Trainer
from protocol.learner_config import CheckpointConfig

log = logging.getLogger(__name__)

_RETRY_S = 2.0


class Checkpointer:
    """All ranks create one and call its methods at the same steps.

    root       the folder of all checkpoints
    dtype      of the Hugging Face folder
    on_saved   called on rank 0 after each checkpoint, with the oldest step to which the run may fall back
    on_failed  called on every rank after each attempt that failed, with its step and its error
    retry_s    pause before the last checkpoint is tried again
    """

    def __init__(
        self,
        trainer: Trainer,
        root: Path,
        *,
        config: CheckpointConfig,
        dtype: torch.dtype,
        on_saved: Callable[[int], None],
        on_failed: Callable[[int, OSError], None],
        retry_s: float = _RETRY_S,
    ) -> None:
        self._trainer = trainer
        self._root = root
        self._config = config
        self._dtype = dtype
        self._on_saved = on_saved
        self._on_failed = on_failed
        self._retry_s = retry_s
        self._is_overdue = False

    def is_due(self, step: int) -> bool:
        """Whether `step` is a multiple of `every_steps`, or the last attempt failed."""
        return self._is_overdue or step % self._config.every_steps == 0

    def try_save(self, step: int) -> bool:
        """Writes the checkpoint of `step`. If the disk cannot be written: logs it and returns False."""
        try:
            self._save(step)
        except OSError as error:
            self._is_overdue = True
            log.error(
                "the checkpoint of step %d cannot be written: %s; training continues, and the next step tries again",
                *(step, error),
            )
            return False
        return True

    def save_last(self, step: int) -> None:
        """Writes the checkpoint of the run's last step; while the disk cannot be written, it waits."""
        wait_for_room(
            lambda: self._save(step),
            what=f"the checkpoint of the last step, {step},",
            is_retried=lambda error: isinstance(error, OSError),
            retry_s=self._retry_s,
        )

    def _save(self, step: int) -> None:
        """Raises: OSError on every rank."""
        try:
            self._write(step)
        except OSError as error:
            self._on_failed(step, error)
            raise
        self._is_overdue = False
        if self._trainer.world.rank == 0:
            self._on_saved(oldest_fallback_step(self._root, keep=self._config.keep))

    def _write(self, step: int) -> None:
        trainer, config = self._trainer, self._config
        progress = TrainingProgress(
            step=step,
            num_skipped_updates=trainer.guard.num_skipped,
            num_consecutive_skips=trainer.guard.num_consecutive,
        )
        save_checkpoint(
            self._root,
            policy=trainer.policy,
            optimizer=trainer.optimizer,
            progress=progress,
            keep=config.keep,
            keep_every_steps=config.keep_every_steps,
            value_head=trainer.scorer.value_head,
            world=trainer.world,
            dtype=self._dtype,
        )
