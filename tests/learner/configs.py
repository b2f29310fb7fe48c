"""Algorithm configs for tests: sections with options of any extension, validated like those of a run file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from learner.algorithms.advantages import Advantages, Credit
from learner.algorithms.diagnostics import Diagnostics
from learner.algorithms.estimators import make_estimator, token_advantages
from learner.algorithms.losses import Loss
from learner.algorithms.token_data import TokenData
from protocol.algorithm_config import (
    ADVANTAGE_OPTIONS,
    CORRECTION_OPTIONS,
    LOSS_OPTIONS,
    AdvantageConfig,
    CorrectionConfig,
    LossConfig,
)
from protocol.extensions import validated_options


def loss_config(**values: Any) -> LossConfig:
    return LossConfig.model_validate(values)


def advantage_config(**values: Any) -> AdvantageConfig:
    return AdvantageConfig.model_validate(values)


def correction(use: str, **options: Any) -> CorrectionConfig:
    return CorrectionConfig.model_validate({"use": use, **options})


def loss_options(config: LossConfig) -> Any:
    """The options of the policy loss, defaults filled in."""
    return validated_options(LOSS_OPTIONS[config.use], config, key="learner.loss")


def advantage_options(config: AdvantageConfig) -> Any:
    """The options of the estimator, defaults filled in."""
    return validated_options(ADVANTAGE_OPTIONS[config.use], config, key="learner.advantage")


def correction_options(config: CorrectionConfig) -> Any:
    """The options of the correction, defaults filled in."""
    return validated_options(CORRECTION_OPTIONS[config.use], config, key="learner.loss.corrections")


def loss_of(tokens: TokenData, config: LossConfig) -> tuple[Tensor, Diagnostics]:
    return Loss(config)(tokens)


def advantages_of(
    credit: Credit, config: AdvantageConfig, *, values: ArrayLike | None = None, kl_penalty: ArrayLike | None = None
) -> Advantages:
    credit = replace(
        credit,
        values=None if values is None else np.asarray(values, dtype=np.float64),
        kl_penalty=None if kl_penalty is None else np.asarray(kl_penalty, dtype=np.float64),
    )
    return token_advantages(credit, config, make_estimator(config))
