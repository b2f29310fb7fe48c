"""Checkpoints: a Hugging Face folder that can be served, and beside it what training needs to go on bit for bit.

    ROOT/step-00000040/   config.json, model.safetensors, tokenizer files     the policy
                          training.safetensors                                AdamW's moments by parameter, RNG states
                          state.json                                          step, counters, size of every other file

Written aside, fsynced and renamed: a folder of that name is complete, or it is not counted. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.policy import Policy
from protocol.errors import DataError

_FOLDER = re.compile(r"^step-(\d{8})$")
_ASIDE = ".writing-"
_STATE = "state.json"
_TENSORS = "training.safetensors"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where training stands: the version `step` that the weights are, and counters."""

    step: int
    num_skipped_updates: int = 0


def save_checkpoint(
    root: Path, *, policy: Policy, optimizer: torch.optim.Optimizer, state: TrainingState, keep: int
) -> Path:
    """Writes the checkpoint of `state.step` under `root`, durably, then deletes all but the newest `keep`.

    A complete checkpoint of the same step is left as it is: a version has one set of weights.
    Raises: OSError where the disk does not take it; what was there before stays.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    folder = root / f"step-{state.step:08d}"
    if not _is_complete(folder):
        root.mkdir(parents=True, exist_ok=True)
        _discard_unfinished(root)
        if folder.exists():
            shutil.rmtree(folder)
        aside = root / f"{_ASIDE}{folder.name}"
        aside.mkdir()
        _write(aside, policy, optimizer, state)
        _sync_folder(aside)
        aside.rename(folder)
        _fsync(root)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(child for child in root.iterdir() if _FOLDER.match(child.name) and _is_complete(child))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`; None where there is none."""
    return next(reversed(list_checkpoints(root)), None)


def restore_training(folder: Path, *, policy: Policy, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Puts the optimiser and the RNG back as they were; `policy` must have been loaded from the same folder.

    Raises: DataError where the folder is not a complete checkpoint of this model.
    """
    if not _is_complete(folder):
        raise DataError(f"checkpoint {folder} is not complete: {_STATE} or a file that it lists is missing")
    try:
        stored = json.loads((folder / _STATE).read_text())
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"checkpoint {folder} cannot be read: {error}") from error
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        moments.setdefault(kind, {})[name] = tensor
    generators = moments.pop("rng")
    for name, parameter in policy.model.named_parameters():
        held = {kind: by_name[name] for kind, by_name in moments.items() if name in by_name}
        if "exp_avg" in held and held["exp_avg"].shape != parameter.shape:
            raise DataError(
                f"checkpoint {folder}: moments of {name} must have shape {tuple(parameter.shape)}, "
                f"got {tuple(held['exp_avg'].shape)}"
            )
        if held:
            device = {kind: t if kind == "step" else t.to(parameter.device) for kind, t in held.items()}
            optimizer.state[parameter] = device
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    return TrainingState(**stored["training"])


def _write(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    policy.model.save_pretrained(folder)
    for file in policy.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    save_file(_training_tensors(policy, optimizer), folder / _TENSORS)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / _STATE).write_text(json.dumps({"training": asdict(state), "files_bytes": sizes}, indent=2) + "\n")


def _training_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if policy.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(policy.device)
    for name, parameter in policy.model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _STATE).read_text())["files_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _discard_unfinished(root: Path) -> None:
    for child in root.iterdir():
        if child.name.startswith(_ASIDE):
            shutil.rmtree(child)


def _sync_folder(folder: Path) -> None:
    for file in folder.iterdir():
        _fsync(file)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
