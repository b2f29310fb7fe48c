"""What the learner can check before a start without loading a model: imported algorithms and their options."""

from __future__ import annotations

from learner.algorithms.estimators import make_estimator
from learner.algorithms.importance_weights import make_corrections
from learner.algorithms.losses import Loss
from protocol.config import Config


def check_algorithms(config: Config) -> None:
    """Imports and creates the advantage estimator, policy loss and corrections of the run. Raises: ConfigError."""
    base_dir, loss = config.run.base_dir, config.learner.loss
    make_estimator(config.learner.advantage, base_dir=base_dir)
    Loss(loss, base_dir=base_dir)
    make_corrections(loss.corrections, base_dir=base_dir)
