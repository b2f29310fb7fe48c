"""The learner's main loop, the same on every rank.

    train recorded batches ─► publish ─┐
    ┌──────────────────────────────────┘
    └► batch ──────► train_step ──► metrics, log ──► checkpoint ──► publish ─┐
       ▲ waits for    waits for      durable before   every n        engines  │
       │ the batch's  nothing        anything else    steps          fetch it │
       │ last group                                                  later    │
       └──────────────────────────────────────────────────────────────────────┘

            consumes                   produces                     waits for                unblocked by
batch       `BatchSource`              groups of step k             the batch's last group   the coordinator, or rank 0
train_step  groups, version k          version k + 1, StepMetrics   collectives with ranks   the other ranks
metrics     StepMetrics, gauges        a line of metrics.jsonl      the network thread       its event loop
log         the batch's cursors        a row in the store's log     room on the disk         the coordinator's retry
checkpoint  version, optimizer state   a folder; if the disk is     the disk                 room on the disk
                                       full, the next step tries    (the last one)
publish     version k + 1, canary      an offer to the engines      the network thread       its event loop

Step k takes version k to k + 1. A batch is in the log before any engine can see its version, so after a crash at any
point the learner resumes: it loads the newest checkpoint and trains the recorded batches again, without any rollout.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors

from learner.batch_source import BatchSource
from learner.metrics.drift import Drift
from learner.metrics.metrics_writer import MetricsWriter
from learner.metrics.progress import Phase
from learner.metrics.step_metrics import StepMetrics
from learner.model.export import canary, published_weights
from learner.network.progress_reporter import ProgressReporter
from learner.store.disk_room import wait_for_room
from learner.store.run_folder import RunFolder
from learner.training.checkpointer import Checkpointer
from learner.training.trainer import Trainer
from protocol.atomic_write import atomic_path
from protocol.codec import pack_groups
from protocol.config import Config
from protocol.errors import DivergenceError, DriftError
from protocol.fault_injection import fault_point
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)


class Loop:
    """The training loop of one rank. `metrics`, `progress`: None except on rank 0.

    step  step of the loaded checkpoint
    """

    def __init__(
        self,
        *,
        config: Config,
        trainer: Trainer,
        source: BatchSource,
        metrics: MetricsWriter | None,
        progress: ProgressReporter | None,
        step: int,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._source = source
        self._metrics = metrics
        self._progress = progress
        self._step = step
        self._dtype = getattr(torch, config.learner.dtype)
        self._folder = RunFolder(config.run.dir)
        self._checkpointer = Checkpointer(
            trainer,
            self._folder.checkpoints,
            config=config.learner.checkpoint,
            dtype=self._dtype,
            on_saved=self._on_checkpoint_saved,
            on_failed=self._on_checkpoint_failed,
        )
        self._num_checkpoint_failures = 0

    def run(self, *, num_steps: int) -> None:
        """Trains the recorded batches after the checkpoint, then new ones until step `num_steps`.

        Raises: NoProgressError, DivergenceError, DriftError.
        """
        while self._step < self._source.num_recorded:
            self._enter("retraining")
            groups = self._source.wait_for_batch(self._step)
            with self._saved_if_it_diverges(groups):
                self._trainer.train_step(groups, step=self._step)
            self._step += 1
            log.info("trained step %d of %d recorded steps again", self._step, self._source.num_recorded)
        publish_s = self._publish()
        if self._metrics is not None and self._source.publishes:
            print(f"learner: ready at {self._config.network.control_address} (step {self._step})", flush=True)
        while self._step < num_steps:
            self._enter("waiting")
            started = time.perf_counter()
            groups = self._source.wait_for_batch(self._step)
            wait_s = time.perf_counter() - started
            self._enter("training")
            with self._saved_if_it_diverges(groups):
                stepped = self._trainer.train_step(groups, step=self._step)
            self._step += 1
            self._record(groups, stepped, wait_s=wait_s, publish_s=publish_s)
            if self._checkpointer.is_due(self._step):
                self._enter("checkpoint")
                self._checkpointer.try_save(self._step)
            publish_s = self._publish()
        self._enter("checkpoint")
        self._checkpointer.save_last(self._step)
        self._finish()

    def _on_checkpoint_saved(self, fallback_step: int) -> None:
        if self._progress is not None:
            self._progress.checkpoint_saved()
        self._source.drop_old_tokens(checkpoint_step=fallback_step)

    def _on_checkpoint_failed(self, step: int, error: OSError) -> None:
        self._num_checkpoint_failures += 1
        if self._progress is not None:
            self._progress.checkpoint_failed(error, step=step)

    def _enter(self, phase: Phase) -> None:
        if self._progress is not None:
            self._progress.enter(phase, step=self._step, num_recorded=self._source.num_recorded)

    @contextmanager
    def _saved_if_it_diverges(self, groups: Sequence[TrajectoryGroup]) -> Iterator[None]:
        """On a DivergenceError, saves the batch and adds its path to the message."""
        try:
            yield
        except DivergenceError as error:
            raise DivergenceError(f"{error}; the batch is in {self._save_failed_batch(groups)}") from error

    def _save_failed_batch(self, groups: Sequence[TrajectoryGroup]) -> Path:
        """Writes the groups of a batch whose step failed. `protocol.codec.unpack_groups` reads the file."""
        path = self._folder.failed_batch(self._step)
        if self._trainer.world.rank == 0:
            try:
                path.write_bytes(pack_groups(groups))
            except OSError as error:  # the error of the step is more important
                log.error("%s cannot be written: %s", path, error)
        return path

    def _publish(self) -> float:
        """Gathers the current weights and offers them to the engines. Returns the seconds that this took."""
        started = time.perf_counter()
        self._enter("publishing")
        if self._source.publishes:
            trainer = self._trainer
            weights = published_weights(trainer.policy.model, world=trainer.world, dtype=self._dtype)
            proof = canary(trainer.scorer, device=trainer.policy.device)
            if weights:
                self._source.publish(save_safetensors(weights), version=self._step, canary=proof)
        return time.perf_counter() - started

    def _record(
        self, groups: Sequence[TrajectoryGroup], stepped: StepMetrics, *, wait_s: float, publish_s: float
    ) -> None:
        """Writes the step's metrics, then its log entry. If the process is killed in between, the step is repeated.

        wait_s: seconds that the loop waited for the batch; publish_s: seconds to publish the version before the step
        """
        if self._metrics is not None:
            gauges = self._source.gauges()
            values = self._metrics.record(
                stepped,
                groups,
                wait_s=wait_s,
                publish_s=publish_s,
                num_checkpoint_failures=self._num_checkpoint_failures,
                gauges=gauges,
            )
            if self._progress is not None:
                self._progress.stepped(values, step=stepped.step)
        self._source.commit_batch(groups)

    def _report_drift(self) -> None:
        """Writes RUN/drift.txt. Raises: DriftError."""
        drift = Drift.read(self._folder.metrics)
        wait_for_room(lambda: self._folder.drift.write_text(f"{drift}\n"), what=self._folder.drift.name)
        print(drift, flush=True)
        if not drift.is_flat:
            raise DriftError(f"log-probs of engines and learner drift apart although no step changed weights: {drift}")

    def _finish(self) -> None:
        """Ends the run and writes finished.json.

        Raises: DriftError; then finished.json is not written, so a restart checks the drift again.
        """
        self._enter("finishing")
        if not self._source.finish(version=self._step):
            log.warning("some serving engines have not committed the last version, %d", self._step)
        if self._metrics is not None:
            if self._config.learner.check_drift:
                self._report_drift()
            summary = {"step": self._step, "num_skipped_updates": self._trainer.guard.num_skipped}
            wait_for_room(lambda: self._write_finished(summary), what=self._folder.finished.name)

    def _write_finished(self, summary: Mapping[str, int]) -> None:
        with atomic_path(self._folder.finished) as temporary:
            temporary.write_text(json.dumps(summary) + "\n")
            fault_point("run.finished")
