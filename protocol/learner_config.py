"""The `[learner]` section: batch, staleness bound, algorithm, optimizer, checkpoints, hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.algorithm_config import AdvantageConfig, LossConfig
from protocol.config_base import Fraction, NonNegative, Positive, Seconds, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(ge=0)] = Field(default=1e-6, description="Learning rate after warm-up.")
    value_learning_rate: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Learning rate of the value head of `gae`, with the same schedule. Unset: `learning_rate`.",
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW betas.")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="AdamW epsilon.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW weight decay.")
    clip_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Largest gradient norm; larger ones are scaled."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Decay of the rate after warm-up, to `final_fraction` of it at the last step."
    )
    warmup_steps: NonNegative = Field(default=0, description="Steps of linear warm-up.")
    final_fraction: Fraction = Field(default=0.1, description="Final rate as a fraction of `learning_rate`.")
    max_consecutive_skips: Positive = Field(
        default=5,
        description="Updates with a non-finite loss or gradient are skipped; this many in a row end the run.",
    )


class LoraConfig(Section):
    """Adapters W + (alpha / rank) B A; nothing else is trained."""

    rank: Positive = Field(default=16, description="Rank of the adapters.")
    alpha: Annotated[float, Field(gt=0)] = Field(default=32.0, description="The adapters are scaled by alpha / rank.")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Names of the linear layers that get an adapter.",
    )


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: Positive = Field(default=20, description="Steps between checkpoints.")
    keep: Positive = Field(default=2, description="How many of the newest checkpoints are kept.")
    keep_every_steps: Positive | None = Field(
        default=None, description="Checkpoints at multiples of this step are kept for good. Unset: none."
    )


class RetentionConfig(Section):
    """Which tokens of trained batches stay in the store. Without either key all stay, so the whole run can be replayed.

    No token is dropped before a durable checkpoint covers its step.
    """

    keep_steps: NonNegative | None = Field(default=None, description="Steps before a checkpoint whose tokens are kept.")
    keep_bytes: NonNegative | None = Field(default=None, description="Largest number of bytes that are kept.")


class LearnerConfig(Section):
    """The learner: batch, staleness bound, algorithm, hardware."""

    num_steps: Positive = Field(default=100, description="Training steps of the run.")
    groups_per_batch: Positive = Field(default=16, description="Groups B of a batch.")
    group_size: Positive = Field(default=8, description="Trajectories G of a group.")
    staleness_bound: NonNegative = Field(
        default=2, description="Largest age of a trained token in steps, enforced by the lease rule; 0 is synchronous."
    )
    skip_zero_variance: bool = Field(
        default=False, description="Give the slot of a group of equal rewards to another group."
    )
    skip_zero_advantage: bool = Field(
        default=True,
        description="Do not compute contexts whose advantages are all 0, if the loss has no KL, entropy or value term: "
        "the gradient is the same without them.",
    )
    tokens_per_micro_batch: Positive = Field(default=16_384, description="Tokens that are computed at once.")
    prefix_sharing: bool | Literal["auto"] = Field(
        default="auto", description="Compute common prefixes of contexts once; `auto`: if that saves time."
    )
    reference: Path | None = Field(default=None, description="Model folder of the KL reference. Unset: model.path.")
    check_drift: bool = Field(
        default=False, description="Train with rate 0: the mismatch between engines and learner must stay flat."
    )
    device: str = Field(default="cpu", description="torch device: cpu, cuda, cuda:1 …")
    ranks: Positive = Field(
        default=1, description="Processes over which the learner is sharded here; one GPU each with cuda."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of computation and of published weights; masters stay float32."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Keep only the layers' inputs and recompute the rest in the backward pass."
    )
    lora: LoraConfig | None = Field(default=None, description="Train adapters only. Unset: all weights.")
    torch_threads: Positive = Field(default=1, description="Torch threads of the learner.")
    lease_timeout_s: Seconds = Field(
        default=10.0, description="A lease that no heartbeat has named for this long expires and is granted again."
    )
    straggler_timeout_s: Seconds | None = Field(
        default=None,
        description="A group that alone delays the batch for this long is overtaken; its over-age tokens are masked. "
        "Unset: wait for it, so that batches do not depend on timing.",
    )
    max_failed_groups: NonNegative = Field(
        default=64,
        description="This many failed or refused groups in a row, with no accepted one between, end the run. 0: never.",
    )
    max_skipped_groups: NonNegative = Field(
        default=1024,
        description="This many groups in a row that `skip_zero_variance` skips end the run. 0: never.",
    )
    first_samples: NonNegative = Field(
        default=32, description="First trajectories of the run that are summarised before training. 0: none."
    )
    progress_log_s: Seconds = Field(
        default=30.0, description="While the learner waits, it logs what it waits for at this interval."
    )
    ablation: Literal["none", "last-context"] = Field(
        default="none", description="`last-context` trains only the last context of each trajectory."
    )
    advantage: AdvantageConfig = Field(default=AdvantageConfig(), description="How sampled tokens are credited.")
    loss: LossConfig = Field(default=LossConfig(), description="Policy loss, corrections, aggregation.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW and its schedule.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="When checkpoints are written and kept."
    )
    retention: RetentionConfig = Field(
        default=RetentionConfig(), description="Which tokens of trained batches are kept."
    )

    @model_validator(mode="after")
    def _fits(self) -> LearnerConfig:
        if self.loss.minibatches > self.groups_per_batch * self.group_size:
            raise ValueError(
                f"learner.loss.minibatches must be <= groups_per_batch * group_size = "
                f"{self.groups_per_batch * self.group_size}, got {self.loss.minibatches}"
            )
        if self.group_size == 1 and self.advantage.is_zero_without_variance:
            raise ValueError(
                f"learner.group_size must be >= 2 with learner.advantage.use = {self.advantage.use!r}, which compares "
                "trajectories of one group: the advantage in a group of one is always 0, got 1 "
                "(reinforce_pp and gae need no group)"
            )
        kl_in_reward = self.loss.kl_in == "reward" and self.loss.kl_coefficient > 0
        if self.skip_zero_variance and (kl_in_reward or not self.advantage.is_zero_without_variance):
            raise ValueError(
                "learner.skip_zero_variance must be false unless groups of equal rewards have advantage 0 "
                "(gae, reinforce_pp, imported estimators, context_rewards and a KL in the reward do not), got true"
            )
        if self.advantage.divides_by_group_std and kl_in_reward:
            raise ValueError(
                "learner.loss.kl_in must be 'loss' with learner.advantage.use = 'grpo' and normalize_std = true, got "
                "'reward': in a group of equal task rewards the std would be that of the KL's noise, and advantages "
                "about +-1; or set learner.advantage.normalize_std = false"
            )
        if self.advantage.use == "maxrl" and kl_in_reward:
            raise ValueError(
                "learner.loss.kl_in must be 'loss' with learner.advantage.use = 'maxrl', whose rewards must be >= 0, "
                "got 'reward'"
            )
        return self
