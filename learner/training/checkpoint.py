"""Checkpoints: a Hugging Face folder that can be served, plus the training state that makes a resume bit-exact.

    ROOT/step-00000040/   config.json, model.safetensors, tokenizer files     the policy, as published
                          training/*.safetensors                              fp32 weights, AdamW state, RNG per rank
                          state.json                                          step, counters, sizes of all other files

learner/training/checkpoint_tensors.py writes training/: one file per rank, readable by any number of ranks. A folder is
written under a temporary name, fsynced and renamed. It is complete if its name is step-* and state.json lists all other
files with their sizes; incomplete folders are ignored. No file is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from learner.model.export import published_weights, save_folder
from learner.model.loading import Policy
from learner.model.parallel import World
from learner.training.checkpoint_tensors import load_training_tensors, save_training_tensors
from protocol.errors import DataError
from protocol.fault_injection import fault_point

_FOLDER = re.compile(r"^step-(\d{8})$")
_UNFINISHED = ".writing-"
"""Prefix of a folder that is being written. Not `atomic_path`: all ranks write into it, and its content is fsynced."""
_DISCARDED = ".discarded-"
_STATE = "state.json"
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
    Raises: OSError if the disk cannot be written; older checkpoints are then kept.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    world = world or World()
    folder = root / f"step-{progress.step:08d}"
    unfinished = root / f"{_UNFINISHED}{folder.name}"
    is_lead = world.rank == 0
    if is_lead:
        root.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(root)
    if not world.all(not is_lead or _is_complete(folder)):
        if is_lead:
            unfinished.mkdir()
        world.barrier()
        save_training_tensors(
            unfinished / _TRAINING, model=policy.model, value_head=value_head, optimizer=optimizer, world=world
        )
        weights = published_weights(policy.model, world=world, dtype=dtype or policy.model.dtype)
        if is_lead:
            save_folder(unfinished, policy.model, weights)
            _finish(unfinished, policy, progress)
            if folder.exists():
                _discard(folder)
            fault_point("checkpoint.written")
            unfinished.rename(folder)
            fault_point("checkpoint.renamed")
            _fsync(root)
    if is_lead:
        for old in list_checkpoints(root)[:-keep]:
            if keep_every_steps is None or _step_of(old) % keep_every_steps:
                _discard(old)
    world.barrier()
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(child for child in root.iterdir() if _FOLDER.match(child.name) and _is_complete(child))


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
    its current one. Raises: DataError if the folder is not a complete checkpoint of this model.
    """
    if not _is_complete(folder):
        raise DataError(f"checkpoint {folder} is not complete: {_STATE} or a file that it lists is missing")
    try:
        progress = TrainingProgress(**json.loads((folder / _STATE).read_text())["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"checkpoint {folder}: {_STATE} cannot be read: {error}") from error
    load_training_tensors(
        folder / _TRAINING, model=policy.model, value_head=value_head, optimizer=optimizer, world=world or World()
    )
    return progress


def _finish(folder: Path, policy: Policy, progress: TrainingProgress) -> None:
    """Adds the tokenizer and, last, the list of all files with their sizes; then fsyncs everything."""
    for file in policy.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(_files(folder))}
    (folder / _STATE).write_text(json.dumps({"training": asdict(progress), "files_bytes": sizes}, indent=2) + "\n")
    for file in _files(folder):
        _fsync(file)
    _fsync(folder / _TRAINING)
    _fsync(folder)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _STATE).read_text())["files_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _discard(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so a partly deleted folder never has the name of a checkpoint."""
    discarded = folder.with_name(f"{_DISCARDED}{folder.name}")
    folder.rename(discarded)
    fault_point("checkpoint.discarded")
    shutil.rmtree(discarded)


def _remove_unfinished(root: Path) -> None:
    """Removes the unfinished and partly deleted checkpoints of a process that was killed."""
    for child in root.iterdir():
        if child.name.startswith((_UNFINISHED, _DISCARDED)):
            shutil.rmtree(child)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
