"""The public API for your own agents and algorithms. docs/extending.md shows how to use it.

Names are imported at their first use: `import palimpsest` imports neither torch nor any role. Nothing inside Palimpsest
imports this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actor.episode import Episode
    from actor.rewards.reward import Reward, Score
    from actor.rewards.text import exact_match, f1, normalise
    from actor.session import BudgetExceeded, Generation, Session
    from actor.tasks.task import Split, Task
    from actor.tools.tool import Observation, Services, Tool, ToolContext
    from actor.workflows.workflow import Workflow
    from learner.algorithms.advantages import Advantages, Credit
    from learner.algorithms.estimators import AdvantageEstimator, GroupEstimator
    from learner.algorithms.importance_weights import Correction
    from learner.algorithms.losses import PolicyLoss
    from learner.algorithms.token_data import TokenData
    from protocol.config_base import Options
    from protocol.errors import ConfigError, DataError, UserError
    from protocol.types import Context, Edge, Passage, Question, Status, Trajectory
    from retriever.encoders.base import Encoder
    from retriever.structures.base import Neighbours, VectorIndex

_NAMES_BY_MODULE = {
    "actor.episode": ("Episode",),
    "actor.rewards.reward": ("Reward", "Score"),
    "actor.rewards.text": ("exact_match", "f1", "normalise"),
    "actor.session": ("BudgetExceeded", "Generation", "Session"),
    "actor.tasks.task": ("Split", "Task"),
    "actor.tools.tool": ("Observation", "Services", "Tool", "ToolContext"),
    "actor.workflows.workflow": ("Workflow",),
    "learner.algorithms.advantages": ("Advantages", "Credit"),
    "learner.algorithms.estimators": ("AdvantageEstimator", "GroupEstimator"),
    "learner.algorithms.importance_weights": ("Correction",),
    "learner.algorithms.losses": ("PolicyLoss",),
    "learner.algorithms.token_data": ("TokenData",),
    "protocol.config_base": ("Options",),
    "protocol.errors": ("ConfigError", "DataError", "UserError"),
    "protocol.types": ("Context", "Edge", "Passage", "Question", "Status", "Trajectory"),
    "retriever.encoders.base": ("Encoder",),
    "retriever.structures.base": ("Neighbours", "VectorIndex"),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "AdvantageEstimator",
    "Advantages",
    "BudgetExceeded",
    "ConfigError",
    "Context",
    "Correction",
    "Credit",
    "DataError",
    "Edge",
    "Encoder",
    "Episode",
    "Generation",
    "GroupEstimator",
    "Neighbours",
    "Observation",
    "Options",
    "Passage",
    "PolicyLoss",
    "Question",
    "Reward",
    "Score",
    "Services",
    "Session",
    "Split",
    "Status",
    "Task",
    "TokenData",
    "Tool",
    "ToolContext",
    "Trajectory",
    "UserError",
    "VectorIndex",
    "Workflow",
    "exact_match",
    "f1",
    "normalise",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'palimpsest' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
