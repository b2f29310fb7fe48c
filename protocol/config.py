"""The config of a run: one TOML file, read into models that refuse unknown keys. docs/config.md lists every key."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.config_base import ExtensionSection, NonNegative, Port, Positive, Seconds, Section, Use
from protocol.errors import DataError, SecurityError
from protocol.learner_config import LearnerConfig

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
    api_key_file: Path | None = Field(
        default=None,
        description="File with the bearer token for HTTP to engines. Unset: `palimpsest up` makes one, for loopback.",
    )
    max_peers: Annotated[int, Field(ge=2)] = Field(
        default=2_048, description="Most connections to each port of the learner, and most actors."
    )
    max_engines: Positive = Field(default=256, description="Most engines whose weight agents the learner accepts.")
    max_unread_mb: Annotated[int, Field(ge=64)] = Field(
        default=1_024,
        description="Most MiB of received but unread messages at each port of the learner; at most 40 per connection.",
    )

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
        """The bearer token for HTTP. Raises: DataError, SecurityError (other users can read the file)."""
        path = self.api_key_file
        if path is None:
            return None
        try:
            if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise SecurityError(f"network.api_key_file {path} can be read by others: run `chmod 600 {path}`")
            key = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise DataError(f"network.api_key_file {path} cannot be read: {reason}") from error
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise DataError(f"network.api_key_file {path} must hold one word of printable ASCII characters")
        return key


class ModelConfig(Section):
    """The model folder of the policy at step 0."""

    path: Path = Field(description="Hugging Face folder: config, safetensors, tokenizer.")


class TaskConfig(ExtensionSection):
    """Where questions come from. The other keys are the options of the task that `use` names."""

    use: Use = Field(default="qa", description="qa, toy, or an import path to a `Task`.")


class RewardConfig(ExtensionSection):
    """The reward function of a trajectory. The other keys are the options of the reward that `use` names."""

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
    max_trajectories: Positive = Field(
        default=64, description="Trajectory slots of one actor: trajectories that it runs at once."
    )
    request_timeout_s: Seconds = Field(default=120.0, description="Time limit of one generation request.")
    search_timeout_s: Seconds = Field(default=30.0, description="Time limit of one search.")
    heartbeat_s: Seconds = Field(default=0.5, description="Interval of heartbeats to the learner.")
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=60.0,
        description="After SIGTERM, how long an actor finishes running groups before it gives their leases back.",
    )


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


class Config(Section):
    """The config of a run. The resolved config is saved as config.json in the run's folder."""

    run: RunConfig = Field(default=RunConfig(), description="Identity and folder of the run.")
    network: NetworkConfig = Field(default=NetworkConfig(), description="Addresses and keys.")
    model: ModelConfig = Field(description="The model folder of the policy at step 0.")
    task: TaskConfig = Field(default=TaskConfig(), description="Where questions come from.")
    reward: RewardConfig = Field(default=RewardConfig(), description="The reward function of a trajectory.")
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
