"""The sections that choose an algorithm: advantage, policy loss, corrections. docs/algorithms.md explains them.

`use` names a built-in, whose options are the models below, or an import path to the user's own class. Options of
built-ins are checked when the config is read; those of imported classes when the learner loads them. No value
may be infinite or NaN: the resolved config is saved as JSON, which has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from protocol.config_base import ExtensionSection, Fraction, Options, Positive, Section, Use

Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Lower = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scope = Literal["token", "context", "trajectory"]

WITHIN_GROUP = ("grpo", "rloo", "maxrl")
"""Built-in estimators that give advantage 0 to a group of equal rewards."""


class GrpoOptions(Options):
    """GRPO: (R - mean) / (std + eps) over the trajectories of a group."""

    normalize_std: bool = Field(default=True, description="Divide by the std of the group; false gives Dr. GRPO.")
    ddof: Literal[0, 1] = Field(
        default=1, description="Degrees of freedom subtracted in the std: 1 is the unbiased estimate."
    )
    eps: Bound = Field(default=1e-6, description="Added to the std.")


class RlooOptions(Options):
    """RLOO: a trajectory's reward minus the mean reward of the others in its group."""


class MaxrlOptions(Options):
    """MaxRL: (R - mean) / (mean + eps); rewards must be >= 0."""

    eps: Bound = Field(default=1e-6, description="Added to the mean reward.")


class ReinforceOptions(Options):
    """REINFORCE++: discounted rewards along the tokens of a trajectory, whitened over the batch."""

    gamma: Fraction = Field(default=1.0, description="Discount per token.")
    whiten: bool = Field(default=True, description="Subtract the mean and divide by the std of the batch's advantages.")
    eps: Bound = Field(default=1e-6, description="Added to the std when whitening.")


class GaeOptions(Options):
    """Generalized advantage estimation with a value head (PPO)."""

    gamma: Fraction = Field(default=1.0, description="Discount per token.")
    lam: Fraction = Field(default=1.0, description="Lambda of GAE.")
    whiten: bool = Field(default=True, description="Subtract the mean and divide by the std of the batch's advantages.")
    eps: Bound = Field(default=1e-6, description="Added to the std when whitening.")


ADVANTAGE_OPTIONS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {
        "grpo": GrpoOptions,
        "rloo": RlooOptions,
        "maxrl": MaxrlOptions,
        "reinforce_pp": ReinforceOptions,
        "gae": GaeOptions,
    }
)


class AdvantageConfig(ExtensionSection):
    """How the advantages of sampled tokens are computed. The other keys are the options of the estimator in `use`."""

    use: Use = Field(default="grpo", description="grpo, rloo, maxrl, reinforce_pp, gae, or an import path.")
    context_rewards: Literal["none", "add"] = Field(
        default="none", description="`add` also uses the rewards that the workflow gave to single contexts."
    )
    role_weights: dict[str, Coefficient] = Field(
        default_factory=dict, description="Role → factor on the advantages of its tokens; roles not named have 1."
    )

    @property
    def is_zero_without_variance(self) -> bool:
        """Whether every group of equal rewards gets advantage 0."""
        return self.use in WITHIN_GROUP and self.context_rewards == "none"

    @property
    def divides_by_group_std(self) -> bool:
        """Whether advantages are divided by the std of the rewards in a group, to which a KL in the reward adds."""
        return self.use == "grpo" and bool(self.options.get("normalize_std", True))


class PpoOptions(Options):
    """PPO: r = pi_theta / pi_prox is clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: Fraction = Field(default=0.2, description="Lower clip distance.")
    clip_high: Coefficient = Field(default=0.2, description="Upper clip distance.")
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Bounds the loss of a token with A < 0 by dual_clip * |A|. Unset: no bound."
    )


class GspoOptions(PpoOptions):
    """GSPO: as PPO, with the geometric mean of r over a context."""


class CispoOptions(Options):
    """CISPO: the clipped ratio weighs log pi_theta; no token loses its gradient."""

    clip_low: Fraction = Field(default=0.2, description="Lower clip distance of the weight.")
    clip_high: Coefficient = Field(default=0.2, description="Upper clip distance of the weight.")


LOSS_OPTIONS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {"ppo": PpoOptions, "gspo": GspoOptions, "cispo": CispoOptions}
)


class _Band(Options):
    low: Lower = Field(description="Lowest weight that is kept.")
    high: Bound = Field(description="Highest weight that is kept.")

    @model_validator(mode="after")
    def _ordered(self) -> _Band:
        if self.low > self.high:
            raise ValueError(f"low must be <= high = {self.high}, got {self.low}")
        return self


class TruncateOptions(Options):
    """Truncated importance sampling: min(w, high), w = pi_prox / pi_behave over the scope."""

    scope: Scope = Field(default="token", description="Tokens over which one w is computed.")
    ratio: Literal["geometric", "product"] = Field(
        default="geometric", description="Mean or sum of log w over the scope."
    )
    high: Bound = Field(default=2.0, description="Upper bound of w.")


class MaskOptions(_Band):
    """Masked importance sampling (IcePop): w inside [low, high], 0 outside."""

    scope: Scope = Field(default="token", description="Tokens over which one w is computed.")
    ratio: Literal["geometric", "product"] = Field(
        default="geometric", description="Mean or sum of log w over the scope."
    )
    low: Lower = Field(default=0.5, description="Lowest w that is kept.")
    high: Bound = Field(default=5.0, description="Highest w that is kept.")


class RejectOptions(_Band):
    """A scope is kept with weight 1 if its w is in [low, high], else dropped."""

    scope: Scope = Field(default="context", description="Tokens that are kept or dropped together.")
    ratio: Literal["geometric", "product", "worst"] = Field(
        default="geometric",
        description="Mean or sum of log w over the scope; `worst`: the w of every token must be in [low, high].",
    )
    low: Lower = Field(default=0.5, description="Lowest w that is kept.")
    high: Bound = Field(default=2.0, description="Highest w that is kept.")


class RejectNegativeOptions(Options):
    """Drops tokens with A < 0 in a scope whose mean log(pi_behave / pi_prox) exceeds `threshold`."""

    scope: Scope = Field(default="context", description="Tokens over which the mean is computed.")
    threshold: Bound = Field(default=1.0, description="In nats.")


class SecondMomentOptions(Options):
    """Drops the tokens of the batch with the largest log(w)^2 until the mean of the rest is <= `threshold`."""

    threshold: Bound = Field(default=0.04, description="Largest mean of log(w)^2, in nats^2.")


CORRECTION_OPTIONS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {
        "truncate": TruncateOptions,
        "mask": MaskOptions,
        "reject": RejectOptions,
        "reject_negative": RejectNegativeOptions,
        "second_moment": SecondMomentOptions,
    }
)


class CorrectionConfig(ExtensionSection):
    """One off-policy correction. The other keys are the options of the correction that `use` names."""

    use: Use = Field(description="truncate, mask, reject, reject_negative, second_moment, or an import path.")


class ValueConfig(Section):
    """The value loss of `gae`."""

    coefficient: Coefficient = Field(default=0.5, description="Factor of the value loss.")
    clip: Bound | None = Field(
        default=None,
        description="Values are clipped to this distance from their value at the start of the step. Unset: no clip.",
    )


class LossConfig(ExtensionSection):
    """The loss: policy loss, corrections, aggregation, KL, entropy, value.

    The other keys are the options of the policy loss that `use` names.
    """

    use: Use = Field(default="ppo", description="Policy loss: ppo, gspo, cispo, or an import path.")
    corrections: tuple[CorrectionConfig, ...] = Field(
        default=(CorrectionConfig(use="truncate"),),
        description="Off-policy corrections; a token's weight is the product of all of them.",
    )
    aggregation: Literal["trajectory", "context", "token", "constant"] = Field(
        default="trajectory",
        description="Unit that has equal weight in the loss; `constant` divides by `constant` per trajectory.",
    )
    constant: Bound = Field(default=1024.0, description="Denominator per trajectory of aggregation `constant`.")
    minibatches: Positive = Field(default=1, description="Optimizer steps per batch, split by trajectory.")
    kl_coefficient: Coefficient = Field(
        default=0.0, description="Factor of the KL to the reference; 0: no reference is loaded."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="Per-token estimator of the KL.")
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="Add the KL to the loss or subtract it from rewards."
    )
    entropy_coefficient: Coefficient = Field(default=0.0, description="Factor of the entropy bonus.")
    value: ValueConfig = Field(default=ValueConfig(), description="The value loss of `gae`.")
