"""Which weights an update may install: folders that the weight agent wrote, with their own version tag."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actor.engine.request_bodies import UpdateBody
from actor.engine.weight_loading import weight_files
from protocol.errors import EngineRefused, UnknownVersion, WeightsError
from protocol.types import PolicyTag


@dataclass(frozen=True, slots=True)
class UpdateSource:
    """root: folder of the weight agent, with one folder publication-N for each publication. run_id: of the tags."""

    root: Path
    run_id: str

    def check(self, body: UpdateBody) -> None:
        """Checks folder and version of an update. Symbolic links are followed. Raises: EngineRefused."""
        root, folder = self.root.resolve(), Path(body.model_path).resolve()
        if not folder.is_relative_to(root):
            raise EngineRefused(f"model_path must be a folder in {root}, got {body.model_path:.200}")
        try:
            tag = PolicyTag.parse(body.weight_version or "")
        except UnknownVersion as error:
            raise EngineRefused(str(error)) from error
        if tag.run_id != self.run_id or folder != root / f"publication-{tag.publication}":
            raise EngineRefused(f"weight_version must be the tag of {folder.name} of run {self.run_id}, got {tag}")
        try:
            files = weight_files(folder)
        except WeightsError as error:
            raise EngineRefused(str(error)) from error
        for file in files:
            if not file.resolve().is_relative_to(folder):
                raise EngineRefused(f"{file} leads out of {folder}")
