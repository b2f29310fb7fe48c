"""The config keys that must not change when a run is resumed: those that affect the data and the training."""

from __future__ import annotations

import json

from protocol.config import Config


def resume_key(config: Config) -> dict[str, str]:
    """Config key → value as text. Keys of placement and speed (addresses, threads, counts) are absent and may change.

    `learner.num_steps` may change unless the learning-rate schedule depends on it.
    """
    learner = config.learner
    parts = {
        "run_id": config.run.name,
        "run.seed": config.run.seed,
        "task": config.task.model_dump(mode="json"),
        "reward": config.reward.model_dump(mode="json"),
        "tool": [tool.model_dump(mode="json") for tool in config.tool],
        "workflow": config.workflow.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json"),
        "groups_per_batch": learner.groups_per_batch,
        "group_size": learner.group_size,
        "staleness_bound": learner.staleness_bound,
        "learner.skip_zero_variance": learner.skip_zero_variance,
        "learner.dtype": learner.dtype,
        "learner.lora": learner.lora.model_dump(mode="json") if learner.lora else "none",
        "learner.check_drift": learner.check_drift,
        "learner.reference": str(learner.reference or "model.path"),
        "ablation": learner.ablation,
        "learner.advantage": learner.advantage.model_dump(mode="json"),
        "learner.loss": learner.loss.model_dump(mode="json"),
        "learner.optimizer": learner.optimizer.model_dump(mode="json"),
    }
    if learner.optimizer.schedule != "constant":
        parts["learner.num_steps"] = learner.num_steps
    return {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in parts.items()}
