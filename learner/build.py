"""Builds the learner from a config, on every rank, and runs its loop on live or recorded batches."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from learner.batch_source import BatchSource, FollowerSource, LiveSource, ReplaySource
from learner.leases.admission import Rules
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.no_progress import ProgressLimits
from learner.loop import Loop
from learner.metrics.metrics_writer import MetricsWriter
from learner.model.loading import load_policy
from learner.model.lora import add_adapters
from learner.model.parallel import World, checkpoint_activations, join
from learner.network.network_thread import NetworkThread
from learner.network.progress_reporter import ProgressReporter
from learner.store.disk_room import wait_for_room
from learner.store.folder_lock import locked
from learner.store.resume_key import changes, resume_key
from learner.store.retention import check_resumable
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from learner.training.checkpoint import newest_folder, restore_checkpoint, set_aside
from learner.training.checkpoint_manifest import DamagedCheckpoint
from learner.training.trainer import Trainer
from protocol.config import Config
from protocol.errors import DataError
from protocol.fault_injection import wall_clock_s
from protocol.run_identity import actor_identity

log = logging.getLogger(__name__)

# If the network thread does not answer in this time, the last state of the run is reported again.
_STATE_TIMEOUT_S = 5.0


def run_learner(config: Config) -> None:
    """Trains until `learner.num_steps`. Resumes from the newest checkpoint and the recorded batches in `run.dir`.

    The ports in `config.network` must be set: the other roles must know them.

    Under torchrun, every rank calls it. Raises: UserError (bad model folder, port in use, bad keys, `run.dir` is in
    use by another run or learner), StoreError, NoProgressError, DivergenceError, DriftError.
    """
    with join(config.learner.device) as world, ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(config.run.dir / "learner.lock", what="a learner"))
        progress = _progress(config, stack, num_steps=config.learner.num_steps) if world.rank == 0 else None
        trainer, step = load_trainer(config, world)
        if progress is not None:
            source, metrics = _start_live_source(config, trainer, progress, stack, step=step)
        else:
            source, metrics = FollowerSource(world, num_recorded=int(world.broadcast(None))), None
        loop = Loop(config=config, trainer=trainer, source=source, metrics=metrics, progress=progress, step=step)
        loop.run(num_steps=config.learner.num_steps)


def run_replay(config: Config, recorded: Path) -> None:
    """Trains the batches recorded in the run folder `recorded`, in their order, without any server.

    Metrics and checkpoints are written to `run.dir`; a second call resumes there. Raises: UserError, StoreError,
    DivergenceError, DriftError.
    """
    with join(config.learner.device) as world, ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(config.run.dir / "learner.lock", what="a learner"))
            _check_replay_folder(config, recorded)
        store = stack.enter_context(closing(Store(RunFolder(recorded).store, read_only=True)))
        num_steps = min(config.learner.num_steps, store.num_batches())
        trainer, step = load_trainer(config, world)
        metrics = _metrics(config, stack, step=step) if world.rank == 0 else None
        if world.rank == 0:
            print(
                f"learner: training the {num_steps} recorded steps of {recorded}, starting at step {step}", flush=True
            )
        progress = _progress(config, stack, num_steps=num_steps) if world.rank == 0 else None
        source = ReplaySource(store)
        loop = Loop(config=config, trainer=trainer, source=source, metrics=metrics, progress=progress, step=step)
        loop.run(num_steps=num_steps)


def load_trainer(config: Config, world: World) -> tuple[Trainer, int]:
    """Loads `model.path`, then the newest intact checkpoint, if any. Returns (trainer, step). Raises: UserError."""
    learner = config.learner
    torch.set_num_threads(learner.torch_threads)
    torch.manual_seed(config.run.seed)
    policy = load_policy(config.model.path, device=str(world.device))
    if learner.lora is not None:
        add_adapters(policy.model, learner.lora)
    if learner.activation_checkpointing:
        checkpoint_activations(policy.model)
    reference = None
    if learner.loss.kl_coefficient:
        reference = load_policy(learner.reference or config.model.path, device=str(world.device))
    trainer = Trainer(
        policy=policy,
        config=learner,
        temperature=config.sampling.temperature,
        reference=reference,
        world=world,
        base_dir=config.run.base_dir,
    )
    return trainer, _restore_newest(RunFolder(config.run.dir).checkpoints, trainer)


def _restore_newest(root: Path, trainer: Trainer) -> int:
    """Loads the newest intact checkpoint into `trainer`; sets damaged ones aside. Returns its step; 0 without one.

    Raises: DataError if a checkpoint belongs to another model or a damaged one cannot be renamed.
    """
    world = trainer.world
    while True:
        newest = newest_folder(root) if world.rank == 0 else None
        if not (text := world.broadcast(str(newest or "").encode()).decode()):
            return 0
        try:
            progress = restore_checkpoint(
                Path(text),
                policy=trainer.policy,
                optimizer=trainer.optimizer,
                value_head=trainer.scorer.value_head,
                world=world,
            )
        except DamagedCheckpoint as error:
            if world.rank == 0:
                log.warning("%s: it is now %s; the run resumes from an older one", error, set_aside(Path(text)).name)
            continue
        trainer.guard.num_skipped = progress.num_skipped_updates
        trainer.guard.num_consecutive = progress.num_consecutive_skips
        log.info("resumed from %s", text)
        return progress.step


def _start_live_source(
    config: Config, trainer: Trainer, progress: ProgressReporter, stack: ExitStack, *, step: int
) -> tuple[BatchSource, MetricsWriter]:
    """Opens the store and starts the network thread, on rank 0. `step`: step of the loaded checkpoint."""
    path, key = RunFolder(config.run.dir).store, resume_key(config)
    store = stack.enter_context(closing(wait_for_room(lambda: Store(path), what=path.name)))
    wait_for_room(lambda: store.claim(key), what=path.name)
    num_recorded = store.num_batches()
    if step > num_recorded:
        raise DataError(
            f"the newest checkpoint in {config.run.dir} is of step {step}, but its store has {num_recorded} batches: "
            "they belong to different runs; choose another run.dir"
        )
    check_resumable(store, step=step)
    trainer.world.broadcast(str(num_recorded).encode())
    network_thread = stack.enter_context(
        _network_thread(config, store, vocab_size=trainer.policy.model.config.vocab_size)
    )
    metrics = _metrics(config, stack, step=num_recorded)
    stack.enter_context(
        progress.attached(
            state=lambda: network_thread.run(network_thread.coordinator.run_state(), timeout_s=_STATE_TIMEOUT_S),
            write_text=metrics.text,
        )
    )
    return LiveSource(
        network_thread, num_recorded=num_recorded, world=trainer.world, retention=config.learner.retention
    ), metrics


def _network_thread(config: Config, store: Store, *, vocab_size: int) -> NetworkThread:
    learner = config.learner
    lease_table = store.restore_lease_table(
        groups_per_batch=learner.groups_per_batch,
        staleness_bound=learner.staleness_bound,
        num_steps=learner.num_steps,
        now_s=wall_clock_s(),
    )
    rules = Rules(
        run_id=config.run.name,
        group_size=learner.group_size,
        vocab_size=vocab_size,
        skip_zero_variance=learner.skip_zero_variance,
    )
    limits = ProgressLimits(max_failed=learner.max_failed_groups, max_skipped=learner.max_skipped_groups)
    has_samples = RunFolder(config.run.dir).first_samples.exists()
    return NetworkThread(
        outcomes=GroupOutcomes(limits=limits, num_first_samples=0 if has_samples else learner.first_samples),
        identity=actor_identity(config),
        network=config.network,
        store=store,
        lease_table=lease_table,
        rules=rules,
        timeouts=LeaseTimeouts(learner.lease_timeout_s, learner.straggler_timeout_s),
        on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )


def _progress(config: Config, stack: ExitStack, *, num_steps: int) -> ProgressReporter:
    log_every_s = config.learner.progress_log_s
    return stack.enter_context(
        ProgressReporter(RunFolder(config.run.dir), num_steps=num_steps, log_every_s=log_every_s)
    )


def _metrics(config: Config, stack: ExitStack, *, step: int) -> MetricsWriter:
    return stack.enter_context(
        MetricsWriter(
            config.run.dir,
            step=step,
            tokenizer_folder=config.model.path,
            staleness_bound=config.learner.staleness_bound,
        )
    )


def _check_replay_folder(config: Config, source: Path) -> None:
    """Writes run.dir/replay.json, or compares it: the recorded run and the resume key must be the same.

    Raises: DataError if run.dir holds a run, a replay of another run, or a replay with another resume key.
    """
    if RunFolder(config.run.dir).store.exists():
        raise DataError(f"run.dir {config.run.dir} already contains a run: choose another folder for the replay")
    path = config.run.dir / "replay.json"
    mine = {"source": json.dumps(str(source.resolve())), **resume_key(config)}
    if not path.exists():
        path.write_text(json.dumps(mine, indent=2) + "\n")
        return
    if problems := changes(json.loads(path.read_text()), mine):
        raise DataError(
            f"{config.run.dir} contains another replay: {'; '.join(problems)}; to resume, undo the change; to start a "
            "new replay, choose another run.dir"
        )
