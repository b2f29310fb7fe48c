"""The engine without HTTP: takes requests, returns finished sequences, and changes weights between two steps.

    generate ─▶ Scheduler ─▶ step ─▶ ModelRunner ─▶ record ─▶ the request's future
                    ▲          │
    pause, resume, abort,      └─ one iteration of the event loop between two steps, for the sockets
    update_weights

Steps run inside the event loop: for the small models that this engine serves, a step takes about a millisecond, and
handing it to a thread would cost more. So everything here is single-threaded, and no state changes between two awaits.
Only new weights are read in another thread.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from actor.engine.request_bodies import GenerateBody, PauseMode, UpdateBody
from actor.engine.request_validation import RequestLimits, is_batch, to_sequences
from actor.engine.scheduler import Scheduler, Step
from actor.engine.sequence import Finish, FinishType, Sequence
from protocol.errors import EngineRefused, EngineUnavailable, WeightsError

_NUM_YIELDS_AFTER_FINISH = 6
"""Iterations of the event loop after a step in which requests finished. They suffice to write the responses and to
queue the clients' next requests, so that these start in the same step and not one after another."""


class StepRunner(Protocol):
    """The model, as the engine uses it. See ModelRunner."""

    def run(self, step: Step) -> tuple[list[int], list[float]]: ...
    def prepare_weights(self, folder: Path) -> Callable[[], None]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Engine:
    """One model with one queue of requests. `run` is the loop that makes steps; the other methods change its state."""

    def __init__(
        self,
        *,
        runner: StepRunner,
        scheduler: Scheduler,
        limits: RequestLimits,
        seed: int,
        model_path: str,
        weight_version: str = "default",
    ) -> None:
        self.model_path = model_path
        self.weight_version = weight_version
        self.scheduler = scheduler
        self._runner = runner
        self._limits = limits
        self._random = random.Random(seed)
        self._pending: dict[str, asyncio.Future[None]] = {}
        self._sequences: dict[str, Sequence] = {}
        self._work = asyncio.Event()
        self._settled = asyncio.Event()
        self._updating = asyncio.Lock()
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Makes steps until cancelled. If a step fails, aborts requests in flight and raises the step's error."""
        try:
            while True:
                self._work.clear()
                if self.scheduler.has_work:
                    num_yields = _NUM_YIELDS_AFTER_FINISH if self._step() else 1
                    for _ in range(num_yields):
                        await asyncio.sleep(0)
                else:
                    self._settled.set()
                    await self._work.wait()
        except Exception as error:
            self._failure = error
            self._abort(list(self.scheduler.in_flight()), "the engine has failed")
            raise

    async def generate(self, body: GenerateBody) -> list[Sequence]:
        """Runs a request to its end and returns its sequences. If the caller is cancelled, the request is aborted.

        Raises: EngineRefused (invalid request), EngineUnavailable (the engine has failed, or its queue is full).
        """
        self.check_alive()
        self._check_room(len(body.input_ids) if is_batch(body) else 1)
        sequences = to_sequences(
            body, limits=self._limits, random_source=self._random, is_in_flight=self._sequences.__contains__
        )
        loop = asyncio.get_running_loop()
        futures = []
        for sequence in sequences:
            if sequence.sampling.max_new_tokens == 0:
                sequence.finish = Finish(FinishType.LENGTH, length=0)
                continue
            future = loop.create_future()
            self._sequences[sequence.rid] = sequence
            self._pending[sequence.rid] = future
            futures.append(future)
            self.scheduler.add(sequence)
        self._work.set()
        try:
            for future in futures:
                await future
        finally:
            self._abort([s for s in sequences if s.finish is None], "the client disconnected")
            for sequence in sequences:
                self._sequences.pop(sequence.rid, None)
                self._pending.pop(sequence.rid, None)
        return sequences

    def check_alive(self) -> None:
        """Raises: EngineUnavailable if a step has failed; the process is then about to end with that error."""
        if self._failure is not None:
            raise EngineUnavailable(f"the engine has failed: {self._failure!r}")

    def _check_room(self, num: int) -> None:
        scheduler = self.scheduler
        if num > scheduler.queue_capacity:
            raise EngineRefused(f"input_ids must have <= {scheduler.queue_capacity} sequences in a batch, got {num}")
        if num > scheduler.queue_room:
            raise EngineUnavailable(
                f"the queue holds at most {scheduler.queue_capacity} requests and has room for "
                f"{max(0, scheduler.queue_room)}, got {num} more: use another engine, or retry later"
            )

    def close(self) -> None:
        """Aborts requests in flight, so that clients get their partial responses before the sockets close."""
        self._abort(list(self.scheduler.in_flight()), "the engine is shutting down")

    def decode_output(self, sequence: Sequence) -> str:
        """Decodes the output to text, without the stop token or stop string that ended it unless `no_stop_trim`."""
        token_ids, finish, sampling = sequence.output_ids, sequence.finish, sequence.sampling
        matched = finish.matched if finish is not None and not sampling.no_stop_trim else None
        if isinstance(matched, int):
            token_ids = token_ids[:-1]
        text = self._runner.decode(token_ids, skip_special_tokens=sampling.skip_special_tokens)
        return text[: text.find(matched)] if isinstance(matched, str) and matched in text else text

    def abort(self, *, rid: str) -> None:
        """Aborts the request `rid`, or every request of the batch `rid`. If none is in flight, does nothing."""
        batch = f"{rid}_"
        chosen = [s for s in self.scheduler.in_flight() if s.rid == rid or s.rid.startswith(batch)]
        self._abort(chosen, "aborted by /abort_request")

    def abort_all(self) -> None:
        self._abort(list(self.scheduler.in_flight()), "aborted by /abort_request")

    def pause(self, mode: PauseMode) -> None:
        """Stops making steps. Idempotent; a second call may change in_place to retract or abort."""
        self.scheduler.pause()
        if mode is PauseMode.ABORT:
            self._abort(list(self.scheduler.in_flight()), "aborted by /pause_generation")
        elif mode is PauseMode.RETRACT:
            self.scheduler.retract()
        self._settled.set()

    def resume(self) -> None:
        self.scheduler.resume()
        self._work.set()

    def flush_cache(self) -> None:
        """Forgets the saved prefixes. Raises: EngineRefused (requests are in flight; so does SGLang)."""
        if not self.scheduler.is_drained:
            num = sum(1 for _ in self.scheduler.in_flight())
            raise EngineRefused(f"flush_cache needs an idle engine, got {num} requests in flight: wait or abort them")
        self.scheduler.forget_prefixes()

    async def update_weights(self, body: UpdateBody) -> int:
        """Changes all weights or none. Returns the number of requests that were paused during the update.

        If the engine is not paused, requests in flight first finish with the old weights, and new requests wait.

        Raises: EngineRefused if the folder's weights do not fit the served model, or if `flush_cache` is set while
            paused requests keep their KV cache; nothing has changed then.
        """
        self.check_alive()
        async with self._updating:
            try:
                commit = await asyncio.to_thread(self._runner.prepare_weights, Path(body.model_path))
            except WeightsError as error:
                raise EngineRefused(str(error)) from error
            if body.abort_all_requests:
                self._abort(list(self.scheduler.in_flight()), "aborted by /update_weights_from_disk")
            self.scheduler.hold()
            try:
                while not (self.scheduler.is_drained or self.scheduler.paused):
                    self._settled.clear()
                    await self._settled.wait()
                if body.flush_cache and self.scheduler.num_running:
                    raise EngineRefused(
                        f"flush_cache must be false while requests are paused in_place, got true with "
                        f"{self.scheduler.num_running} of them: pause with mode retract"
                    )
                commit()
                self.scheduler.forget_prefixes()
                self.weight_version = body.weight_version or self.weight_version
                self.model_path = body.model_path
                return sum(1 for _ in self.scheduler.in_flight()) if self.scheduler.paused else 0
            finally:
                self.scheduler.end_hold()
                self._work.set()

    def _step(self) -> bool:
        """Runs one forward pass. Returns whether a sequence finished."""
        step = self.scheduler.next_step()
        if step is None:
            return False
        finished = False
        token_ids, logprobs = self._runner.run(step)
        for sequence, token_id, logprob in zip(step.decode + step.prefill, token_ids, logprobs, strict=True):
            if math.isfinite(logprob):
                sequence.record(token_id=token_id, logprob=logprob, version=self.weight_version)
                if sequence.sampling.stop_strings and sequence.finish is None:
                    self._match_stop_strings(sequence)
            else:
                sequence.abort("the model's output is not finite")
            if sequence.finish is not None:
                self._resolve(sequence)
                finished = True
        return finished

    def _match_stop_strings(self, sequence: Sequence) -> None:
        """Finishes the sequence if its output ends with a stop string.

        A new match ends within the last token, so it is enough to decode one token for each of its characters.
        """
        strings = sequence.sampling.stop_strings
        num_tail = max(len(string) for string in strings) + 1
        tail = self._runner.decode(
            sequence.output_ids[-num_tail:], skip_special_tokens=sequence.sampling.skip_special_tokens
        )
        for string in strings:
            if string in tail:
                sequence.finish = Finish(FinishType.STOP, matched=string)
                return

    def _abort(self, sequences: list[Sequence], message: str) -> None:
        if not sequences:
            return
        for sequence in sequences:
            sequence.abort(message)
            self._resolve(sequence)
        self.scheduler.drop_finished()
        self._work.set()

    def _resolve(self, sequence: Sequence) -> None:
        future = self._pending.pop(sequence.rid, None)
        if future is not None and not future.done():
            future.set_result(None)
