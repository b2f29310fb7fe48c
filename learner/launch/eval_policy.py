"""The policy that an evaluation measures: a checkpoint of a run, or what engines serve."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from learner.store.run_folder import RunFolder
from protocol.atomic_write import atomic_path
from protocol.config import Config
from protocol.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPolicy:
    """Either `engines` that run, or the folder `model` that an engine of the evaluation serves.

    text            what is evaluated, for messages
    name            part of the evaluation's identity; "" for engines: their weight versions identify them
    step            the number of batches that the policy was trained on; `model` only
    is_kept         False if the run may delete `model`, which is an old checkpoint then
    weight_version  that the engine states for `model`
    """

    text: str
    engines: tuple[str, ...] = ()
    model: Path | None = None
    name: str = ""
    step: int = 0
    is_kept: bool = True
    weight_version: str = ""


def choose_checkpoint(config: Config, root: Path, step: int | None) -> EvaluatedPolicy:
    """The checkpoint of `step`, by default the newest. Step 0 is model.path.

    Raises: DataError if the run has no complete checkpoint of this step.
    """
    from learner.training.checkpoint import list_checkpoints

    folders = {int(folder.name.rpartition("-")[2]): folder for folder in list_checkpoints(RunFolder(root).checkpoints)}
    known = {0: config.model.path, **folders}
    chosen = max(known) if step is None else step
    if chosen not in known:
        raise DataError(
            f"{RunFolder(root).checkpoints} has no checkpoint of step {chosen}; it has "
            f"{', '.join(map(str, sorted(folders))) or 'none'}, and step 0 is model.path"
        )
    model = known[chosen]
    if not (model / "config.json").is_file():
        raise DataError(f"model folder {model} does not exist or has no config.json; choose another --checkpoint")
    what = "model.path" if chosen not in folders else f"checkpoint {chosen}"
    return EvaluatedPolicy(
        text=f"evaluating {what} of {config.run.name}",
        model=model,
        name=f"{config.run.name} step {chosen}",
        step=chosen,
        is_kept=chosen not in folders,
        weight_version=f"{config.run.name}:step-{chosen}",
    )


def linked_model(policy: EvaluatedPolicy, links: Path) -> Path:
    """A folder with the policy's files that stays while the evaluation is not complete, also if the run goes on.

    A run deletes old checkpoints; the files are therefore linked (or copied, on another file system) to a folder in
    `links`. Training state is not. Raises: DataError if the checkpoint is deleted meanwhile.
    """
    assert policy.model is not None
    if policy.is_kept:
        return policy.model
    folder = links / policy.model.name
    if folder.is_dir():
        return folder
    try:
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
