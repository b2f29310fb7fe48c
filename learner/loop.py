"""The learner's main loop.

    replay recorded batches ─► publish ─┐
    ┌───────────────────────────────────┘
    └► next_batch ──► train_step ──► metrics, log ──► checkpoint ──► publish ─┐
       ▲ waits for     waits for      durable before   every n        engines  │
       │ the batch's   nothing        anything else    steps          fetch it │
       │ last group                                                   later    │
       └───────────────────────────────────────────────────────────────────────┘

Step k takes version k to k + 1. A batch is in the log before its version can be seen by an engine, so a crash at any
point resumes by loading the newest checkpoint and training the recorded batches again, without generating anything.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Sequence

import torch
from safetensors.torch import save as save_safetensors

from learner.admission import Rules
from learner.checkpoint import TrainingState, latest_checkpoint, restore_training, save_checkpoint
from learner.identity import identity_of
from learner.journal import Journal
from learner.ledger import Ledger
from learner.lock import locked
from learner.plane import Plane
from learner.policy import Policy, load_policy
from learner.step_metrics import StepMetrics
from learner.store import Store, finished_path, store_path
from learner.trainer import Trainer
from protocol.config import Config
from protocol.config_file import require_ports
from protocol.errors import ConfigError, DataError
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)

# At the end, engines get this long to commit the last version before the learner leaves.
_LAST_COMMIT_TIMEOUT_S = 60.0
_DRAIN_S = 1.0


def run_learner(config: Config) -> None:
    """Trains until `learner.num_steps`; resumes where an earlier process of the same run stopped.

    Raises: UserError (bad model folder, port in use, keys, a folder that belongs to another run or to a learner that
    is running), StoreError.
    """
    with locked(config.run.dir / "learner.lock", what="a learner"):
        torch.set_num_threads(config.learner.torch_threads)
        torch.manual_seed(config.run.seed)
        trainer, step = _load(config)
        store = Store(store_path(config.run.dir))
        try:
            store.claim(identity_of(config))
            if step > (recorded := store.num_batches()):
                raise DataError(
                    f"the newest checkpoint in {config.run.dir} is of step {step}, but its store has {recorded} "
                    "batches: they are not of one run; choose another run.dir"
                )
            _serve(config, trainer, store, step=step)
        finally:
            store.close()


def _serve(config: Config, trainer: Trainer, store: Store, *, step: int) -> None:
    require_ports(config, "network.control_port", "network.weights_port", "network.announce_port")
    learner = config.learner
    ledger = Ledger.restore(
        groups_per_batch=learner.groups_per_batch,
        staleness_bound=learner.staleness_bound,
        num_steps=learner.num_steps,
        step=store.num_batches(),
        entries=store.entries(),
        leases=store.running_leases(),
        next_lease_id=store.next_lease_id(),
    )
    rules = Rules(
        run_id=config.run.name,
        group_size=learner.group_size,
        vocab_size=trainer.policy.model.config.vocab_size,
        skip_zero_variance=learner.skip_zero_variance,
    )
    plane = Plane(
        network=config.network,
        store=store,
        ledger=ledger,
        rules=rules,
        lease_timeout_s=learner.lease_timeout_s,
        on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    with plane, Journal(config.run.dir, step=ledger.step, tokenizer_folder=config.model.path) as journal:
        Loop(config=config, trainer=trainer, plane=plane, journal=journal, step=step).run(recorded=ledger.step)


class Loop:
    """Holds the step; `run` is the whole of it."""

    def __init__(self, *, config: Config, trainer: Trainer, plane: Plane, journal: Journal, step: int) -> None:
        self._config = config
        self._trainer = trainer
        self._plane = plane
        self._journal = journal
        self._step = step

    def run(self, *, recorded: int) -> None:
        """From the checkpoint's step over `recorded` batches to the end."""
        num_steps = self._config.learner.num_steps
        while self._step < recorded:
            groups = self._plane.run(self._plane.coordinator.recorded_batch(self._step))
            self._train(groups)
            log.info("replayed step %d of %d recorded", self._step, recorded)
        publish_s = self._publish()
        print(f"learner: ready at {self._config.network.control_address} (step {self._step})", flush=True)
        while self._step < num_steps:
            started = time.perf_counter()
            groups = self._plane.run(self._plane.coordinator.next_batch())
            wait_s = time.perf_counter() - started
            stepped = self._train(groups)
            self._record(groups, stepped, wait_s=wait_s, publish_s=publish_s)
            if self._step % self._config.learner.checkpoint.every_steps == 0:
                self._save()
            publish_s = self._publish()
        self._save()
        self._finish()

    def _train(self, groups: Sequence[TrajectoryGroup]) -> StepMetrics:
        stepped = self._trainer.train_step(groups, step=self._step)
        self._step += 1
        return stepped

    def _publish(self) -> float:
        """Offers the current weights; the seconds that it took."""
        started = time.perf_counter()
        data = snapshot_bytes(self._trainer.policy)
        self._plane.publish(data, version=self._step)
        return time.perf_counter() - started

    def _save(self) -> None:
        save_checkpoint(
            self._config.run.dir / "checkpoints",
            policy=self._trainer.policy,
            optimizer=self._trainer.optimizer,
            state=TrainingState(step=self._step, num_skipped_updates=self._trainer.num_skipped_updates),
            keep=self._config.learner.checkpoint.keep,
        )

    def _record(
        self, groups: Sequence[TrajectoryGroup], stepped: StepMetrics, *, wait_s: float, publish_s: float
    ) -> None:
        """Metrics, then the log: killed in between, the step is trained and written once more, and nothing is missing.

        `publish_s` is that of the version that the step started from.
        """
        gauges = self._plane.run(self._plane.coordinator.gauges())
        self._journal.record(stepped, groups, wait_s=wait_s, publish_s=publish_s, gauges=gauges)
        self._plane.run(self._plane.coordinator.finish_batch([group.cursor for group in groups]))

    def _finish(self) -> None:
        """Engines commit the last version, actors are told to leave."""
        self._plane.run(self._plane.coordinator.drain("the run has reached its last step"))
        if not self._plane.run(self._plane.wait_committed(self._step, timeout_s=_LAST_COMMIT_TIMEOUT_S)):
            log.warning("not every engine has committed version %d", self._step)
        time.sleep(_DRAIN_S)
        summary = {"step": self._step, "num_skipped_updates": self._trainer.num_skipped_updates}
        finished_path(self._config.run.dir).write_text(json.dumps(summary) + "\n")


def snapshot_bytes(policy: Policy) -> bytes:
    """The weights as a safetensors file, tied ones once, under the names that `save_pretrained` gives."""
    tied = set(getattr(policy.model, "all_tied_weights_keys", {}) or {})
    state = policy.model.state_dict()
    return save_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in tied}
    )


def _load(config: Config) -> tuple[Trainer, int]:
    """(trainer, the step that its weights are): from the newest checkpoint, else from model.path."""
    checkpoint = latest_checkpoint(config.run.dir / "checkpoints")
    try:
        torch.empty(0, device=config.learner.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"learner.device {config.learner.device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    policy = load_policy(checkpoint or config.model.path, dtype=config.learner.dtype, device=config.learner.device)
    trainer = Trainer(policy=policy, config=config.learner, temperature=config.sampling.temperature)
    if checkpoint is None:
        return trainer, 0
    state = restore_training(checkpoint, policy=policy, optimizer=trainer.optimizer)
    trainer.num_skipped_updates = state.num_skipped_updates
    log.info("resumed from %s", checkpoint)
    return trainer, state.step
