"""Settings that are valid but have no effect, or contradict each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from protocol.config import Config


def pointless_settings(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (config key, what is wrong and what to do)."""
    yield from _processes(config)
    yield from _training(config)
    yield from _checkpoints(config)


def _processes(config: Config) -> Iterator[tuple[str, str]]:
    actor, engine, learner = config.actor, config.engine, config.learner
    if not actor.count:
        yield "actor.count", "0: `palimpsest up` starts no actor; start them by hand (palimpsest actor CONFIG)"
    if not engine.count and not engine.urls:
        yield "engine.count", "0, and engine.urls is empty: `palimpsest up` starts no engine; start one by hand"
    if engine.count and engine.max_total_tokens < config.workflow.context_tokens:
        yield (
            "engine.max_total_tokens",
            f"{engine.max_total_tokens} is below workflow.context_tokens = {config.workflow.context_tokens}: an engine "
            "cannot hold one full context; raise it",
        )
    if actor.count and actor.max_trajectories < learner.group_size:
        yield (
            "actor.max_trajectories",
            f"{actor.max_trajectories} is below learner.group_size = {learner.group_size}: an actor cannot run the "
            "trajectories of one group at once; raise it",
        )


def _training(config: Config) -> Iterator[tuple[str, str]]:
    learner = config.learner
    loss, optimizer = learner.loss, learner.optimizer
    if learner.straggler_timeout_s is not None and learner.staleness_bound == 0:
        yield (
            "learner.straggler_timeout_s",
            "it never acts with learner.staleness_bound = 0: no group of a later batch can overtake; remove it, or "
            "raise the bound",
        )
    if learner.skip_zero_variance and learner.group_size == 2:
        yield (
            "learner.skip_zero_variance",
            "with learner.group_size = 2, most groups have equal rewards and are skipped; raise group_size",
        )
    if optimizer.learning_rate == 0 and not learner.check_drift:
        yield "learner.optimizer.learning_rate", "0: nothing is trained; raise it, or set learner.check_drift"
    if optimizer.warmup_steps >= learner.num_steps:
        yield (
            "learner.optimizer.warmup_steps",
            f"{optimizer.warmup_steps} is not below learner.num_steps = {learner.num_steps}: learning_rate is not "
            "reached before the last step; lower it",
        )
    if optimizer.schedule == "constant" and "final_fraction" in optimizer.model_fields_set:
        yield "learner.optimizer.final_fraction", "it has no effect with schedule = 'constant'; set linear or cosine"
    if not loss.kl_coefficient:
        if learner.reference is not None:
            yield "learner.reference", "it is not loaded with learner.loss.kl_coefficient = 0; set the coefficient"
        for key in sorted({"kl_estimator", "kl_in"} & loss.model_fields_set):
            yield f"learner.loss.{key}", "it has no effect with learner.loss.kl_coefficient = 0; set the coefficient"
    if loss.aggregation != "constant" and "constant" in loss.model_fields_set:
        yield "learner.loss.constant", "it has no effect unless learner.loss.aggregation = 'constant'"
    if learner.advantage.use != "gae" and ":" not in learner.advantage.use and "value" in loss.model_fields_set:
        yield "learner.loss.value", "it has no effect unless learner.advantage.use = 'gae'"


def _checkpoints(config: Config) -> Iterator[tuple[str, str]]:
    learner, checkpoint = config.learner, config.learner.checkpoint
    if checkpoint.every_steps > learner.num_steps:
        yield (
            "learner.checkpoint.every_steps",
            f"{checkpoint.every_steps} is above learner.num_steps = {learner.num_steps}: a learner that restarts "
            "trains every step again; lower it",
        )
    kept = checkpoint.keep_every_steps
    if kept is not None and kept % checkpoint.every_steps:
        yield (
            "learner.checkpoint.keep_every_steps",
            f"{kept} is not a multiple of every_steps = {checkpoint.every_steps}: only common multiples are kept",
        )
