"""The policy that an evaluation measures: a checkpoint of a run, or what engines serve."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from learner.store.run_folder import RunFolder
from learner.training.checkpoint_manifest import DamagedCheckpoint, check_content, check_sizes
from protocol.atomic_write import atomic_path
from protocol.config import Config
from protocol.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPolicy:
    """Either `engines` that run, or the folder `model` that an engine of the evaluation serves.

    text            what is evaluated, for messages
    warnings        about checkpoints that are damaged
    name            part of the evaluation's identity; "" for engines: their weight versions identify them
    step            the number of batches that the policy was trained on; `model` only
    is_kept         False if the run may delete `model`, which is an old checkpoint then
    weight_version  that the engine states for `model`
    """

    text: str
    warnings: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    model: Path | None = None
    name: str = ""
    step: int = 0
    is_kept: bool = True
    weight_version: str = ""


def choose_checkpoint(config: Config, root: Path, step: int | None, *, is_run: bool) -> EvaluatedPolicy:
    """The checkpoint of `step`, by default the newest of the run in `root`. Step 0 is model.path.

    `is_run`: the user named the run's folder, so a run without checkpoints is refused and model.path is not used.
    Raises: DataError if the run has no undamaged checkpoint of this step.
    """
    folders, damage = _checkpoints(RunFolder(root).checkpoints)
    known = folders if step is None and (is_run or damage) else {0: config.model.path, **folders}
    chosen = max(known, default=None) if step is None else step
    if chosen is None or chosen not in known:
        missing = "no checkpoint" if chosen is None else f"no checkpoint of step {chosen}"
        found = "; ".join([", ".join(map(str, sorted(folders))) or "none", *damage])
        raise DataError(
            f"{RunFolder(root).checkpoints} has {missing}; it has {found}; --checkpoint 0 evaluates model.path"
        )
    model = known[chosen]
    if not (model / "config.json").is_file():
        raise DataError(f"model folder {model} does not exist or has no config.json; choose another --checkpoint")
    what = f"checkpoint {chosen}" if chosen in folders else f"model.path, {model},"
    return EvaluatedPolicy(
        text=f"evaluating {what} of {config.run.name}",
        warnings=tuple(damage),
        model=model,
        name=f"{config.run.name} step {chosen}",
        step=chosen,
        is_kept=chosen not in folders,
        weight_version=f"{config.run.name}:step-{chosen}",
    )


def _checkpoints(root: Path) -> tuple[dict[int, Path], list[str]]:
    """(step → folder of each complete checkpoint, what is wrong with each other one)"""
    folders: dict[int, Path] = {}
    damage: list[str] = []
    for folder in sorted(root.glob("step-*")):
        try:
            folders[check_sizes(folder).training["step"]] = folder
        except (DamagedCheckpoint, KeyError) as error:
            damage.append(str(error))
    return folders, damage


def linked_model(policy: EvaluatedPolicy, links: Path) -> Path:
    """A folder with the policy's files that stays until the evaluation is complete, also if the run continues.

    A run deletes old checkpoints. So the policy's files, without the training state, are linked (or copied, on another
    file system) to a folder in `links`. Raises: DataError (the checkpoint is damaged, or was deleted before all files
    were linked).
    """
    assert policy.model is not None
    if policy.is_kept:
        return policy.model
    folder = links / policy.model.name
    if folder.is_dir():
        return folder
    try:
        check_content(policy.model, policy_only=True)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for file in policy.model.iterdir():
                if file.is_file():
                    _link(file, temporary / file.name)
    except FileNotFoundError as error:
        raise DataError(f"checkpoint {policy.model} was deleted by the run: evaluate a newer one") from error
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
