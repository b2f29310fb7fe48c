"""What the samples of an evaluation depend on. Samples of different identities are never put into one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from protocol.atomic_write import atomic_write
from protocol.config import Config
from protocol.errors import ConfigError, DataError
from protocol.evaluation import EvaluationPlan
from protocol.identity_differences import differences
from protocol.run_identity import actor_identity

# Sections of an actor's identity that only training uses.
_TRAINING_SECTIONS = ("learner", "sampling")
_PLAN_KEYS = {"policy", "split", "samples", "temperature", "seed"}


def evaluation_identity(config: Config, plan: EvaluationPlan) -> dict[str, str]:
    """Section → JSON text: files by their content. `limit` does not count: questions may be added to an evaluation.

    Raises: DataError (an unreadable file).
    """
    identity = actor_identity(config)
    for section in _TRAINING_SECTIONS:
        identity.pop(section, None)
    return {**identity, "evaluation": json.dumps(plan.model_dump(mode="json", include=_PLAN_KEYS), sort_keys=True)}


def check_identity(path: Path, mine: Mapping[str, str]) -> None:
    """Writes `mine` to `path`, or compares it with what is there. Raises: ConfigError with the keys that differ."""
    if not path.is_file():
        atomic_write(path, json.dumps(mine, indent=2) + "\n")
        return
    try:
        recorded = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; start anew with --overwrite") from error
    if problems := differences(recorded, mine, what="this one", reference="it"):
        raise ConfigError(
            f"{path.parent} contains another evaluation: {'; '.join(problems)}; choose another --output, or start "
            "anew with --overwrite"
        )
