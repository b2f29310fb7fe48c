"""The sections that choose an algorithm: advantages, off-policy corrections, losses. docs/algorithms.md explains each.

Nothing here may be infinite or NaN: the resolved config is saved as JSON, which has neither.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.config_base import Fraction, Positive, Section

Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Lower = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scope = Literal["token", "context", "trajectory"]


class AdvantageConfig(Section):
    """How tokens are credited: `grpo`, `rloo`, `maxrl` within a group; `reinforce_pp`, `gae` along the tokens.

    `normalize_std`, `ddof`: the std of grpo; `eps` is added to every denominator. `gamma`, `lam`, `whiten`: of the
    estimators along tokens. `context_rewards`: `add` uses the rewards that a task gives to single contexts.
    `role_weights` multiplies the advantages of a role's tokens; roles that are not named weigh 1.
    """

    estimator: Literal["grpo", "rloo", "maxrl", "reinforce_pp", "gae"] = "grpo"
    normalize_std: bool = True
    ddof: Literal[0, 1] = 1
    eps: Bound = 1e-6
    gamma: Fraction = 1.0
    lam: Fraction = 1.0
    whiten: bool = True
    context_rewards: Literal["none", "add"] = "none"
    role_weights: dict[str, Coefficient] = Field(default_factory=dict)

    @property
    def is_zero_without_variance(self) -> bool:
        """Whether trajectories of equal reward get advantage 0."""
        return self.estimator in ("grpo", "rloo", "maxrl") and self.context_rewards == "none"


class _Band(Section):
    low: Lower
    high: Bound

    @model_validator(mode="after")
    def _ordered(self) -> _Band:
        if self.low > self.high:
            raise ValueError(f"low must be <= high = {self.high}, got {self.low}")
        return self


class TruncateConfig(Section):
    """Truncated importance sampling: min(w, high), w = pi_prox / pi_behave over the scope."""

    kind: Literal["truncate"] = "truncate"
    scope: Scope = "token"
    ratio: Literal["geometric", "product"] = "geometric"
    high: Bound = 2.0


class MaskConfig(_Band):
    """Masked importance sampling (IcePop): w inside [low, high], 0 outside."""

    kind: Literal["mask"] = "mask"
    scope: Scope = "token"
    ratio: Literal["geometric", "product"] = "geometric"
    low: Lower = 0.5
    high: Bound = 5.0


class RejectConfig(_Band):
    """A scope is kept, unweighted, where its ratio lies in [low, high]; `worst`: where that of all its tokens does."""

    kind: Literal["reject"] = "reject"
    scope: Scope = "context"
    ratio: Literal["geometric", "product", "worst"] = "geometric"
    low: Lower = 0.5
    high: Bound = 2.0


class RejectNegativeConfig(Section):
    """Drops tokens with A < 0 in a scope whose mean log(pi_behave / pi_prox) is above `threshold`."""

    kind: Literal["reject_negative"] = "reject_negative"
    scope: Scope = "context"
    threshold: Bound = 1.0


class SecondMomentConfig(Section):
    """Drops the tokens of the batch with the largest log(w)^2 until the mean of those that remain is <= `threshold`."""

    kind: Literal["second_moment"] = "second_moment"
    threshold: Bound = 0.04


Correction = Annotated[
    TruncateConfig | MaskConfig | RejectConfig | RejectNegativeConfig | SecondMomentConfig,
    Field(discriminator="kind"),
]


class ValueConfig(Section):
    """The value loss of `gae`. `clip`: how far a value may move from that at the start of the step, where it is set."""

    coefficient: Coefficient = 0.5
    clip: Bound | None = None


class LossConfig(Section):
    """The loss of a token, its corrections (a list: their product is taken), and the aggregation over the batch.

    `clip_low`, `clip_high` bound r = pi_theta / pi_prox to [1 - clip_low, 1 + clip_high]. `dual_clip` c caps the loss
    of a token with A < 0 at c |A|. The KL to the reference is added to the loss or taken from the reward.
    """

    policy_loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    clip_low: Fraction = 0.2
    clip_high: Coefficient = 0.2
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    corrections: tuple[Correction, ...] = (TruncateConfig(),)
    aggregation: Literal["trajectory", "context", "token", "constant"] = "trajectory"
    constant: Bound = 1024.0
    minibatches: Positive = 1
    kl_coefficient: Coefficient = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coefficient: Coefficient = 0.0
    value: ValueConfig = ValueConfig()

    @model_validator(mode="after")
    def _fits(self) -> LossConfig:
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            raise ValueError(f"dual_clip must not be set where policy_loss is 'cispo', got {self.dual_clip}")
        return self
