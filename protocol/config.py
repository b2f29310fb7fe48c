"""The one config of a run: a TOML file read into models that refuse unknown keys and name the path of a bad value."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.algorithm_config import AdvantageConfig, LossConfig
from protocol.config_base import Fraction, NonNegative, Port, Positive, Seconds, Section
from protocol.errors import DataError

Beta = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Section):
    """Where a run lives. `name` stands in every weight version, so that tokens of another run are refused."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,48}$")] = "run"
    dir: Path = Path("runs/run")
    seed: NonNegative = 0


class NetworkConfig(Section):
    """Addresses. Port 0 takes a free one at launch. A host beyond loopback needs `keys` (see `palimpsest keys`)."""

    host: str = "127.0.0.1"
    control_port: Port = 0
    weights_port: Port = 0
    announce_port: Port = 0
    keys: Path | None = None
    api_key_file: Path | None = None

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
    """A Hugging Face folder: config, safetensors, tokenizer."""

    path: Path


class TaskConfig(Section):
    """`qa`: question-answer JSONL files. `toy`: worlds made from seeds; training questions rotate over `worlds`."""

    kind: Literal["qa", "toy"] = "qa"
    questions: tuple[Path, ...] = ()
    eval_questions: tuple[Path, ...] = ()
    worlds: tuple[NonNegative, ...] = ()
    eval_worlds: tuple[NonNegative, ...] = ()
    reward: Literal["em", "f1", "memsearcher"] = "em"

    @model_validator(mode="after")
    def _has_questions(self) -> TaskConfig:
        if self.kind == "qa" and not self.questions:
            raise ValueError("task.questions must name at least one JSONL file where task.kind is 'qa'")
        if self.kind == "toy" and not self.worlds:
            raise ValueError("task.worlds must name at least one seed where task.kind is 'toy'")
        return self


class WorkflowConfig(Section):
    """How an episode runs. Budgets are tokens of the model's own tokenizer, the same in training and evaluation.

    `memory_overflow`: what happens to a memory that reaches `memory_tokens`: `truncate` keeps its first tokens,
    `fail` ends the trajectory. Turns or context tokens that run out end the trajectory as over_budget.
    """

    name: Literal["memsearcher"] = "memsearcher"
    rendering: Literal["chat", "toy"] = "chat"
    fidelity: Literal["mended", "paper"] = "mended"
    max_turns: Positive = 5
    action_tokens: Positive = 512
    memory_tokens: Positive = 1024
    context_tokens: Positive = 6024
    top_n: Annotated[int, Field(ge=1, le=100)] = 5
    memory_overflow: Literal["truncate", "fail"] = "truncate"

    @model_validator(mode="after")
    def _fits(self) -> WorkflowConfig:
        if self.action_tokens + self.memory_tokens >= self.context_tokens:
            raise ValueError(
                "workflow.action_tokens + workflow.memory_tokens must be < workflow.context_tokens = "
                f"{self.context_tokens}, got {self.action_tokens} + {self.memory_tokens}: raise context_tokens, which "
                "holds the prompt, an action, an observation and a memory"
            )
        return self


class SamplingConfig(Section):
    """Training samples from the whole distribution: under a truncating sampler the recorded log-probs, which are those
    of the whole distribution, are not those of the behaviour policy, and pi_prox / pi_behave is wrong."""

    temperature: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _not_truncating(cls, values: object) -> object:
        if isinstance(values, dict) and (given := sorted({"top_p", "top_k", "min_p"} & values.keys())):
            raise ValueError(
                f"{given[0]} is refused: a truncating sampler's log-probs are not those that it records, so that "
                "importance weights would be wrong; set temperature"
            )
        return values


class ActorConfig(Section):
    """`max_trajectories` run at once in each of `count` actor processes."""

    count: NonNegative = 1
    max_trajectories: Positive = 64
    request_timeout_s: Seconds = 120.0
    search_timeout_s: Seconds = 30.0
    heartbeat_s: Seconds = 0.5


class EngineConfig(Section):
    """`count` embedded engines started here, and `urls` of SGLang servers that are attached to (one agent each).

    `canary_tolerance`: by so many nats, on average, an engine's log-probs of the canary may differ from the learner's.
    """

    count: NonNegative = 1
    urls: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    max_running_requests: Positive = 128
    max_total_tokens: Positive = 65_536
    torch_threads: Positive = 1
    canary_tolerance: Annotated[float, Field(gt=0)] = 0.1


class RetrieverConfig(Section):
    """`indexes`: name → index folder made by `palimpsest index`, all served by one process."""

    indexes: dict[str, Path] = Field(default_factory=dict)
    port: Port = 0
    max_batch: Positive = 64
    threads: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"


class OptimizerConfig(Section):
    """AdamW. After `warmup_steps` of linear warm-up, `linear` and `cosine` decay to `final_fraction` of the rate.

    `max_consecutive_skips`: an update whose loss or gradient is not finite is skipped; so many in a row end the run.
    """

    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = 0.1
    max_consecutive_skips: Positive = 5


class LoraConfig(Section):
    """Adapters W + (alpha / rank) B A on the linear layers named `targets`; nothing else trains."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class CheckpointConfig(Section):
    """Every `every_steps` a checkpoint is written; the newest `keep` stay, and all of steps that `keep_every_steps`
    divides."""

    every_steps: Positive = 20
    keep: Positive = 2
    keep_every_steps: Positive | None = None


class RetentionConfig(Section):
    """Which tokens of trained batches stay in the store: those of the last `keep_steps` steps before a checkpoint, and
    of no more than `keep_bytes`. None is dropped before a durable checkpoint. Without either, all stay, so that the
    whole run can be replayed."""

    keep_steps: NonNegative | None = None
    keep_bytes: NonNegative | None = None


class LearnerConfig(Section):
    """A step takes `groups_per_batch` B groups of `group_size` G; ages stay <= `staleness_bound` by construction.

    `lease_timeout_s`: a lease without a heartbeat that names it for so long is expired and issued again.
    `straggler_timeout_s`: a group that has run for so long and alone holds up the batch is overtaken, and those of its
    tokens that are over age when it is trained are masked; None waits for it, and batches do not depend on timing.
    `tokens_per_micro_batch`: computed at once; `prefix_sharing`: whether common prefixes of contexts are computed once
    (`auto`: where it pays). `reference`: the model folder that a KL is taken to; model.path if not given.
    `check_drift`: train with rate 0, so that the mismatch between engines and learner must stay flat.
    `dtype`: that of the computation and of published weights; the masters of bfloat16 are float32.
    `ranks`: processes over which the learner is sharded on this machine, a GPU each with device cuda.
    `activation_checkpointing`: keep the inputs of layers only, and compute the rest again in the backward.
    """

    num_steps: Positive = 100
    groups_per_batch: Positive = 16
    group_size: Positive = 8
    staleness_bound: NonNegative = 2
    skip_zero_variance: bool = False
    tokens_per_micro_batch: Positive = 16_384
    prefix_sharing: bool | Literal["auto"] = "auto"
    reference: Path | None = None
    check_drift: bool = False
    device: str = "cpu"
    ranks: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    lora: LoraConfig | None = None
    torch_threads: Positive = 1
    lease_timeout_s: Seconds = 10.0
    straggler_timeout_s: Seconds | None = None
    ablation: Literal["none", "last-context"] = "none"
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    retention: RetentionConfig = RetentionConfig()

    @model_validator(mode="after")
    def _fits(self) -> LearnerConfig:
        if self.loss.minibatches > self.groups_per_batch * self.group_size:
            raise ValueError(
                f"learner.loss.minibatches must be <= groups_per_batch * group_size = "
                f"{self.groups_per_batch * self.group_size}, got {self.loss.minibatches}"
            )
        if self.skip_zero_variance and not self.advantage.is_zero_without_variance:
            raise ValueError(
                "learner.skip_zero_variance must be false where groups of equal rewards can have advantages (gae, "
                "reinforce_pp, context_rewards, a KL in the reward), got true"
            )
        kl_in_reward = self.loss.kl_in == "reward" and self.loss.kl_coefficient > 0
        if self.skip_zero_variance and (kl_in_reward or not self.advantage.is_zero_without_variance):
            raise ValueError(
                "learner.skip_zero_variance must be false where groups of equal rewards can have advantages (gae, "
                "reinforce_pp, context_rewards, a KL in the reward), got true"
            )
        if self.advantage.estimator == "maxrl" and kl_in_reward:
            raise ValueError(
                "learner.loss.kl_in must be 'loss' where learner.advantage.estimator is 'maxrl', whose rewards must "
                "be >= 0, got 'reward'"
            )
        return self


class Config(Section):
    """Everything of a run. The resolved one is saved as config.json in the run's folder."""

    run: RunConfig = RunConfig()
    network: NetworkConfig = NetworkConfig()
    model: ModelConfig
    task: TaskConfig
    workflow: WorkflowConfig = WorkflowConfig()
    sampling: SamplingConfig = SamplingConfig()
    actor: ActorConfig = ActorConfig()
    engine: EngineConfig = EngineConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    learner: LearnerConfig = LearnerConfig()
