"""Checkpoints: a Hugging Face folder that can be served, plus the training state that makes a resume bit-exact.

    ROOT/step-00000040/   config.json, model.safetensors, tokenizer files     the policy, as published
                          training/*.safetensors                              fp32 weights, AdamW state, RNG per rank
                          state.json                                          step, counters, checksums of the rest

learner/training/checkpoint_tensors.py writes training/: one file per rank, readable by any number of ranks. A folder is
written under a temporary name, fsynced and renamed. It is complete if its name is step-* and state.json lists all other
files with their sizes (learner/training/checkpoint_manifest.py). The checksums are verified when it is loaded; a
damaged folder is renamed to damaged-step-* (`set_aside`), and the run resumes from an older one. No file is a pickle.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from learner.model.export import published_weights, save_folder
from learner.model.loading import Policy
from learner.model.parallel import World
from learner.training.checkpoint_manifest import NAME as MANIFEST_NAME
from learner.training.checkpoint_manifest import DamagedCheckpoint, check_content, check_sizes, make_manifest
from learner.training.checkpoint_tensors import load_training_tensors, save_training_tensors
from protocol.fault_injection import fault_point

_FOLDER = re.compile(r"^step-(\d{8})$")
_UNFINISHED = ".writing-"
"""Prefix of a folder that is being written. Not `atomic_path`: all ranks write into it, and its content is fsynced."""
_DISCARDED = ".discarded-"
_DAMAGED = "damaged-"
_TRAINING = "training"


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """The progress of training. `step`: the version of the weights = the number of batches trained."""

    step: int
    num_skipped_updates: int = 0
    num_consecutive_skips: int = 0


def save_checkpoint(
    root: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    progress: TrainingProgress,
    keep: int,
    keep_every_steps: int | None = None,
    value_head: nn.Module | None = None,
    world: World | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Durably writes the checkpoint of `progress.step` under `root`, then deletes old ones; returns its folder.

    keep, keep_every_steps  kept are the newest `keep`, and all whose step is a multiple of `keep_every_steps`
    value_head              trained with the policy; None if there is none
    world                   all its ranks call this and return when it is done; `root` must be a shared folder
    dtype                   of the Hugging Face folder; the model's own by default
    A complete checkpoint of the same step is left unchanged: a version has one set of weights.
    Raises: OSError on every rank if the disk cannot be written; the unfinished folder is then removed, and older
    checkpoints are kept.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    world = world or World()
    folder = root / f"step-{progress.step:08d}"
    unfinished = root / f"{_UNFINISHED}{folder.name}"
    _on_lead(world, lambda: _make_root(root))
    if not world.all(world.rank != 0 or _is_complete(folder)):
        try:
            _on_lead(world, unfinished.mkdir)
            save_training_tensors(
                unfinished / _TRAINING, model=policy.model, value_head=value_head, optimizer=optimizer, world=world
            )
            weights = published_weights(policy.model, world=world, dtype=dtype or policy.model.dtype)
            _on_lead(world, lambda: _finish(unfinished, folder, policy=policy, weights=weights, progress=progress))
        except OSError:
            if world.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
    _on_lead(world, lambda: _discard_old(root, keep=keep, keep_every_steps=keep_every_steps))
    return folder


def _on_lead(world: World, action: Callable[[], object]) -> None:
    """Runs `action` on rank 0; all ranks wait for it. Raises: OSError on every rank if the disk cannot be written."""
    failure: OSError | None = None
    if world.rank == 0:
        try:
            action()
        except OSError as error:
            failure = error
        except SafetensorError as error:
            failure = OSError(str(error))
    if not world.all(failure is None):
        raise failure or OSError("rank 0 could not write the checkpoint")


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(child for child in root.iterdir() if _is_named_like_one(child) and _is_complete(child))


def newest_folder(root: Path) -> Path | None:
    """The newest folder with the name of a checkpoint under `root`, also if it is damaged; None if there is none."""
    return max(filter(_is_named_like_one, root.iterdir()), default=None) if root.is_dir() else None


def oldest_fallback_step(root: Path, *, keep: int) -> int:
    """The step to which a run falls back if all but the oldest of its newest `keep` checkpoints are damaged.

    It is 0, the start, while there are fewer than `keep`.
    """
    newest = list_checkpoints(root)[-keep:]
    return _step_of(newest[0]) if len(newest) == keep else 0


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint to damaged-step-*, so that it is not loaded again. Returns its new path."""
    target, number = folder.with_name(f"{_DAMAGED}{folder.name}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{_DAMAGED}{folder.name}-{number}")
    return folder.rename(target)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`; None if there is none."""
    return next(reversed(list_checkpoints(root)), None)


def restore_checkpoint(
    folder: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    value_head: nn.Module | None = None,
    world: World | None = None,
) -> TrainingProgress:
    """Restores the trained weights, the optimizer and the RNG; the number of ranks may have changed.

    Weights that are not trained are not restored: with adapters, `policy` must be loaded from the folder that the run
    started from; otherwise from any folder with the same config. A rank without an RNG state in the checkpoint keeps
    its current one. Raises: DamagedCheckpoint on every rank, before anything is loaded, if a file is missing or has
    another content; DataError if it is a checkpoint of another model.
    """
    world = world or World()
    damage: DamagedCheckpoint | None = None
    if world.rank == 0:
        try:
            _progress(folder, check_content(folder).training)
        except DamagedCheckpoint as error:
            damage = error
    if not world.all(damage is None):
        raise damage or DamagedCheckpoint(f"checkpoint {folder} is damaged: see the log of rank 0")
    progress = _progress(folder, check_sizes(folder).training)
    load_training_tensors(
        folder / _TRAINING, model=policy.model, value_head=value_head, optimizer=optimizer, world=world
    )
    return progress


def _progress(folder: Path, training: Mapping[str, int]) -> TrainingProgress:
    try:
        return TrainingProgress(**training)
    except TypeError as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST_NAME} cannot be read: {error}") from error


def _make_root(root: Path) -> None:
    """Creates the folder of all checkpoints, or removes the unfinished and partly deleted ones of a killed process."""
    root.mkdir(parents=True, exist_ok=True)
    for child in root.iterdir():
        if child.name.startswith((_UNFINISHED, _DISCARDED)):
            shutil.rmtree(child)


def _finish(
    unfinished: Path, folder: Path, *, policy: Policy, weights: dict[str, Tensor], progress: TrainingProgress
) -> None:
    """Adds the policy and, last, the manifest; fsyncs everything; renames `unfinished` to `folder`."""
    save_folder(unfinished, policy.model, weights)
    for file in policy.tokenizer_files:
        shutil.copyfile(file, unfinished / file.name)
    (unfinished / MANIFEST_NAME).write_text(make_manifest(unfinished, training=asdict(progress)))
    for file in (path for path in unfinished.rglob("*") if path.is_file()):
        _fsync(file)
    _fsync(unfinished / _TRAINING)
    _fsync(unfinished)
    if folder.exists():
        _discard(folder)
    fault_point("checkpoint.written")
    unfinished.rename(folder)
    fault_point("checkpoint.renamed")
    _fsync(folder.parent)


def _is_named_like_one(folder: Path) -> bool:
    return _FOLDER.match(folder.name) is not None


def _is_complete(folder: Path) -> bool:
    try:
        check_sizes(folder)
    except DamagedCheckpoint:
        return False
    return True


def _discard_old(root: Path, *, keep: int, keep_every_steps: int | None) -> None:
    for old in list_checkpoints(root)[:-keep]:
        if keep_every_steps is None or _step_of(old) % keep_every_steps:
            _discard(old)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _discard(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so a partly deleted folder never has the name of a checkpoint."""
    discarded = folder.with_name(f"{_DISCARDED}{folder.name}")
    folder.rename(discarded)
    fault_point("checkpoint.discarded")
    shutil.rmtree(discarded)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
