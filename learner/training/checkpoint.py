"""Checkpoints: a Hugging Face folder that can be served, and beside it what training needs to go on bit for bit.

    ROOT/step-00000040/   config.json, model.safetensors, tokenizer files     the policy, as published
                          training/*.safetensors                              masters, AdamW's moments, RNG of each rank
                          state.json                                          step, counters, size of every other file

training/ is written by torch.distributed.checkpoint, one file a rank, and can be read by any number of ranks. Folders
are written aside, fsynced and renamed: a folder of that name is complete, or it is not counted. No pickle on disk.
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
from learner.training.checkpoint_tensors import load_training, save_training
from protocol.errors import DataError
from protocol.fault_injection import fault_point

_FOLDER = re.compile(r"^step-(\d{8})$")
_ASIDE = ".writing-"
_DISCARDED = ".discarded-"
_STATE = "state.json"
_TRAINING = "training"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where training stands: the version `step` that the weights are, which is the position in the log; counters."""

    step: int
    num_skipped_updates: int = 0
    num_consecutive_skips: int = 0


def save_checkpoint(
    root: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    keep: int,
    keep_every_steps: int | None = None,
    value_head: nn.Module | None = None,
    world: World | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the checkpoint of `state.step` under `root`, durably, then deletes what the keep policy does not keep.

    keep, keep_every_steps  the newest `keep` stay, and for ever those of steps that `keep_every_steps` divides
    value_head              trained with the policy, where there is one
    world                   all its ranks call this and return when it is done; `root` is a folder that they share
    dtype                   of the Hugging Face folder; the model's own if not given
    A complete checkpoint of the same step is left as it is: a version has one set of weights.
    Raises: OSError where the disk does not take it; what was there before stays.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    world = world or World()
    folder = root / f"step-{state.step:08d}"
    aside = root / f"{_ASIDE}{folder.name}"
    leads = world.rank == 0
    if leads:
        root.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(root)
    if not world.all(not leads or _is_complete(folder)):
        if leads:
            aside.mkdir()
        world.barrier()
        save_training(aside / _TRAINING, model=policy.model, value_head=value_head, optimizer=optimizer, world=world)
        weights = published_weights(policy.model, world=world, dtype=dtype or policy.model.dtype)
        if leads:
            save_folder(aside, policy.model, weights)
            _complete(aside, policy, state)
            if folder.exists():
                _discard(folder)
            fault_point("checkpoint.written")
            aside.rename(folder)
            fault_point("checkpoint.renamed")
            _fsync(root)
    if leads:
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
    """The newest complete checkpoint under `root`; None where there is none."""
    return next(reversed(list_checkpoints(root)), None)


def restore_training(
    folder: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    value_head: nn.Module | None = None,
    world: World | None = None,
) -> TrainingState:
    """Puts the weights that train, the optimiser and the RNG back as they were; the ranks may be more or fewer.

    What does not train must be as it was: where adapters train, `policy` is loaded from the folder that the run began
    with, otherwise from any of the same config. A rank that the checkpoint does not know keeps its RNG.
    Raises: DataError where the folder is not a complete checkpoint of this model.
    """
    if not _is_complete(folder):
        raise DataError(f"checkpoint {folder} is not complete: {_STATE} or a file that it lists is missing")
    try:
        state = TrainingState(**json.loads((folder / _STATE).read_text())["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"checkpoint {folder}: {_STATE} cannot be read: {error}") from error
    load_training(
        folder / _TRAINING, model=policy.model, value_head=value_head, optimizer=optimizer, world=world or World()
    )
    return state


def _complete(folder: Path, policy: Policy, state: TrainingState) -> None:
    """Adds the tokenizer and, last, the list of all files; then all of it is on the disk."""
    for file in policy.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(_files(folder))}
    (folder / _STATE).write_text(json.dumps({"training": asdict(state), "files_bytes": sizes}, indent=2) + "\n")
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
    """Deletes a folder; its name is gone before any of its files is."""
    doomed = folder.with_name(f"{_DISCARDED}{folder.name}")
    folder.rename(doomed)
    fault_point("checkpoint.discarded")
    shutil.rmtree(doomed)


def _remove_unfinished(root: Path) -> None:
    for child in root.iterdir():
        if child.name.startswith((_ASIDE, _DISCARDED)):
            shutil.rmtree(child)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
