"""The config of a run: one TOML file, read into models that refuse unknown keys. docs/config.md lists every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.algorithm_config import AdvantageConfig, LossConfig
from protocol.config_base import ExtensionSection, Fraction, NonNegative, Port, Positive, Seconds, Section, Use
from protocol.errors import DataError

Beta = Annotated[float, Field(ge=0, lt=1)]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")]


class RunConfig(Section):
    """Identity and folder of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,48}$")] = Field(
        default="run", description="Part of every weight version, so that tokens of another run are refused."
    )
    dir: Path = Field(default=Path("runs/run"), description="Folder of the run: store, checkpoints, logs, metrics.")
    seed: NonNegative = Field(default=0, description="Seed of question order, sampling and initialization.")
    base_dir: Path | None = Field(
        default=None,
        description="Folder that relative paths in extension options are taken from. Unset: the run file's.",
    )


class NetworkConfig(Section):
    """Addresses. A host beyond loopback needs `keys` (see `palimpsest keys`)."""

    host: str = Field(default="127.0.0.1", description="Host that the roles listen on and connect to.")
    control_port: Port = Field(default=0, description="Leases and groups. 0: a free port is chosen at launch.")
    weights_port: Port = Field(default=0, description="Weights. 0: a free port is chosen at launch.")
    announce_port: Port = Field(default=0, description="Announcements of versions. 0: a free port is chosen at launch.")
    keys: Path | None = Field(default=None, description="Folder of CURVE keys; required beyond loopback.")
    api_key_file: Path | None = Field(default=None, description="File with the bearer token for HTTP to engines.")

    @property
    def control_address(self) -> str:
        return f"tcp://{self.host}:{self.control_port}"

    @property
    def weights_address(self) -> str:
        return f"tcp://{self.host}:{self.weights_port}"

    @property
    def announce_address(self) -> str:
        return f"tcp://{self.host}:{self.announce_port}"

    def api_key(self) -> str | None:
        """The bearer token for HTTP. Raises: DataError."""
        if self.api_key_file is None:
            return None
        try:
            return self.api_key_file.read_text().strip()
        except OSError as error:
            raise DataError(f"network.api_key_file {self.api_key_file} cannot be read: {error.strerror}") from error


class ModelConfig(Section):
    """The first policy."""

    path: Path = Field(description="Hugging Face folder: config, safetensors, tokenizer.")


class TaskConfig(ExtensionSection):
    """Where questions come from. The other keys are the options of the task that `use` names."""

    use: Use = Field(default="qa", description="qa, toy, or an import path to a `Task`.")


class RewardConfig(ExtensionSection):
    """What a trajectory is worth. The other keys are the options of the reward that `use` names."""

    use: Use = Field(default="em", description="em, f1, memsearcher, or an import path to a `Reward`.")


class ToolConfig(ExtensionSection):
    """One tool, `[[tool]]`. The other keys are the options of the tool that `use` names."""

    use: Use = Field(description="search, or an import path to a `Tool`.")
    name: ToolName | None = Field(
        default=None, description="Name under which the workflow finds it. Unset: `use` of a built-in."
    )

    @model_validator(mode="after")
    def _has_a_name(self) -> ToolConfig:
        if not self.name and ":" in self.use:
            raise ValueError(f"name must be set for a tool with an import path ({self.use})")
        return self

    @property
    def lookup_name(self) -> str:
        """The name under which a workflow finds the tool."""
        return self.name or self.use


class WorkflowConfig(ExtensionSection):
    """How an episode runs. The other keys are the options of the workflow that `use` names.

    Budgets are tokens of the model's own tokenizer, the same in training and evaluation.
    """

    use: Use = Field(default="memsearcher", description="memsearcher, or an import path to a `Workflow`.")
    context_tokens: Annotated[int, Field(ge=2)] = Field(
        default=6024, description="Most tokens of a context: prompt, observations and generations."
    )
    tools: tuple[ToolName, ...] | None = Field(
        default=None, description="Names of the tools that the workflow gets. Unset: those that its class names."
    )


class SamplingConfig(Section):
    """How training samples.

    A truncating sampler (top_p, top_k, min_p) is refused: engines record log-probs of the whole distribution, so the
    importance weights pi_prox / pi_behave would be wrong.
    """

    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Sampling temperature in training.")

    @model_validator(mode="before")
    @classmethod
    def _not_truncating(cls, values: object) -> object:
        if isinstance(values, dict) and (given := sorted({"top_p", "top_k", "min_p"} & values.keys())):
            raise ValueError(
                f"{given[0]} is refused: engines record log-probs of the whole distribution, so with a truncating "
                "sampler the importance weights would be wrong; set temperature"
            )
        return values


class ActorConfig(Section):
    """Actor processes."""

    count: NonNegative = Field(default=1, description="Actor processes started by `palimpsest up`.")
    max_trajectories: Positive = Field(default=64, description="Trajectories that one actor runs at once.")
    request_timeout_s: Seconds = Field(default=120.0, description="Time limit of one generation request.")
    search_timeout_s: Seconds = Field(default=30.0, description="Time limit of one search.")
    heartbeat_s: Seconds = Field(default=0.5, description="Interval of heartbeats to the learner.")


class EngineConfig(Section):
    """Inference engines: embedded ones that are started here, and SGLang servers that run already."""

    count: NonNegative = Field(default=1, description="Embedded engines started by `palimpsest up`.")
    urls: tuple[str, ...] = Field(default=(), description="SGLang servers to attach to, one weight agent each.")
    ports: tuple[Port, ...] = Field(default=(), description="HTTP ports of the embedded engines. Empty: free ports.")
    max_running_requests: Positive = Field(default=128, description="Requests that an embedded engine decodes at once.")
    max_total_tokens: Positive = Field(default=65_536, description="Tokens in the KV cache of an embedded engine.")
    torch_threads: Positive = Field(default=1, description="Torch threads of an embedded engine.")
    canary_tolerance: Annotated[float, Field(gt=0)] = Field(
        default=0.1,
        description="Largest mean difference in nats between an engine's and the learner's canary log-probs.",
    )


class RetrieverConfig(Section):
    """The retriever process. It is started if `indexes` names one; only tools that search need it."""

    indexes: dict[str, Path] = Field(
        default_factory=dict, description="Name → index folder made by `palimpsest index`; one process serves all."
    )
    port: Port = Field(default=0, description="Port of the retriever. 0: a free port is chosen at launch.")
    max_batch: Positive = Field(default=64, description="Queries that are encoded and searched together.")
    threads: Positive = Field(default=1, description="Threads of the encoder and of the index.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Precision of the encoder.")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(ge=0)] = Field(default=1e-6, description="Learning rate after warm-up.")
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
        description="Updates with a non-finite loss or gradient are skipped; more than this many in a row end the run.",
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
    """Which tokens of trained batches stay in the store. None is dropped before a durable checkpoint covers it. Without
    either key all stay, so the whole run can be replayed."""

    keep_steps: NonNegative | None = Field(
        default=None, description="Number of steps before a checkpoint whose tokens are kept."
    )
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
        kl_in_reward = self.loss.kl_in == "reward" and self.loss.kl_coefficient > 0
        if self.skip_zero_variance and (kl_in_reward or not self.advantage.is_zero_without_variance):
            raise ValueError(
                "learner.skip_zero_variance must be false unless groups of equal rewards have advantage 0 "
                "(gae, reinforce_pp, imported estimators, context_rewards and a KL in the reward do not), got true"
            )
        if self.advantage.use == "maxrl" and kl_in_reward:
            raise ValueError(
                "learner.loss.kl_in must be 'loss' with learner.advantage.use = 'maxrl', whose rewards must be >= 0, "
                "got 'reward'"
            )
        return self


class Config(Section):
    """Everything of a run. The resolved config is saved as config.json in the run's folder."""

    run: RunConfig = Field(default=RunConfig(), description="Identity and folder of the run.")
    network: NetworkConfig = Field(default=NetworkConfig(), description="Addresses and keys.")
    model: ModelConfig = Field(description="The first policy.")
    task: TaskConfig = Field(default=TaskConfig(), description="Where questions come from.")
    reward: RewardConfig = Field(default=RewardConfig(), description="What a trajectory is worth.")
    tool: tuple[ToolConfig, ...] = Field(
        default=(), description="Tools of the workflow; unlisted built-ins have defaults."
    )
    workflow: WorkflowConfig = Field(default=WorkflowConfig(), description="How an episode runs.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="How training samples.")
    actor: ActorConfig = Field(default=ActorConfig(), description="Actor processes.")
    engine: EngineConfig = Field(default=EngineConfig(), description="Inference engines.")
    retriever: RetrieverConfig = Field(default=RetrieverConfig(), description="The retriever process.")
    learner: LearnerConfig = Field(default=LearnerConfig(), description="The learner.")

    @model_validator(mode="after")
    def _tool_names_differ(self) -> Config:
        names = [tool.lookup_name for tool in self.tool]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tool: two tools have the name {name!r}; give one of them another `name`")
        return self
