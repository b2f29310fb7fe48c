"""The engine without HTTP: requests in, sequences out, weights changed between two steps.

    generate ─▶ Scheduler ─▶ step ─▶ ModelRunner ─▶ record ─▶ the request's future
                    ▲          │
    pause, continue, abort,    └─ one turn of the event loop between two steps, for the sockets
    update_weights

Steps run inside the event loop. For the models that this engine is for, a step takes about a millisecond, and
handing it to a thread costs more than it takes; everything here is therefore single-threaded and between two awaits
nothing else changes. Only the reading of new weights leaves the loop.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from actor.engine.admission import Limits, admit, is_batch
from actor.engine.api import GenerateBody, PauseMode, UpdateBody
from actor.engine.request import Finish, FinishType, Sequence
from actor.engine.scheduler import Scheduler, Step
from protocol.errors import EngineRefused, EngineUnavailable, WeightsError

_NUM_TURNS_AFTER_FINISH = 6
"""Turns of the event loop after a step in which requests finished: enough to write the answers and to read and queue
the requests that follow them, so that these join the next step together and not one after another."""


class Runner(Protocol):
    """What the engine needs of a model: see ModelRunner."""

    def run(self, step: Step) -> tuple[list[int], list[float]]: ...
    def prepare_weights(self, folder: Path) -> Callable[[], None]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Engine:
    """One model, one queue. `run` is the loop that makes progress; everything else asks."""

    def __init__(self, *, runner: Runner, scheduler: Scheduler, limits: Limits, seed: int, model_path: str) -> None:
        self.model_path = model_path
        self.weight_version = "default"
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
        """Make steps while there is work. Ends with the error of a step; requests in flight are then aborted."""
        try:
            while True:
                self._work.clear()
                if self.scheduler.has_work:
                    num_turns = _NUM_TURNS_AFTER_FINISH if self._step() else 1
                    for _ in range(num_turns):
                        await asyncio.sleep(0)
                else:
                    self._settled.set()
                    await self._work.wait()
        except Exception as error:
            self._failure = error
            self._abort(list(self.scheduler.in_flight()), "the engine has failed")
            raise

    async def generate(self, body: GenerateBody) -> list[Sequence]:
        """Run a request to its end. Where the caller is cancelled, so is the request.

        Raises: EngineRefused where the request is wrong, EngineUnavailable where the engine has failed or its queue is
            full.
        """
        self.check_alive()
        self._check_room(len(body.input_ids) if is_batch(body) else 1)
        sequences = admit(body, limits=self._limits, random_source=self._random, in_flight=self._sequences.__contains__)
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
            self._abort([s for s in sequences if s.finish is None], "the client is gone")
            for sequence in sequences:
                self._sequences.pop(sequence.rid, None)
                self._pending.pop(sequence.rid, None)
        return sequences

    def check_alive(self) -> None:
        """Raises: EngineUnavailable where a step has failed: the process is then about to end with its error."""
        if self._failure is not None:
            raise EngineUnavailable(f"the engine has failed: {self._failure!r}")

    def _check_room(self, num: int) -> None:
        scheduler = self.scheduler
        if num > scheduler.max_queued:
            raise EngineRefused(f"input_ids must have <= {scheduler.max_queued} sequences in a batch, got {num}")
        if num > scheduler.num_free:
            raise EngineUnavailable(
                f"the queue holds at most {scheduler.max_queued} requests and has room for "
                f"{max(0, scheduler.num_free)}, got {num} more: ask another engine, or later"
            )

    def close(self) -> None:
        """End what is in flight, so that clients have their partial answers before the sockets close."""
        self._abort(list(self.scheduler.in_flight()), "the engine stops")

    def text(self, sequence: Sequence) -> str:
        """The output as text, without the stop token or string that ended it unless `no_stop_trim`."""
        token_ids, finish, sampling = sequence.output_ids, sequence.finish, sequence.sampling
        matched = finish.matched if finish is not None and not sampling.no_stop_trim else None
        if isinstance(matched, int):
            token_ids = token_ids[:-1]
        text = self._runner.decode(token_ids, skip_special_tokens=sampling.skip_special_tokens)
        return text[: text.find(matched)] if isinstance(matched, str) and matched in text else text

    def abort(self, *, rid: str) -> None:
        """End a request, or all those of a batch that was given `rid`; one that is not in flight is no error."""
        batch = f"{rid}_"
        chosen = [s for s in self.scheduler.in_flight() if s.rid == rid or s.rid.startswith(batch)]
        self._abort(chosen, "aborted by /abort_request")

    def abort_all(self) -> None:
        self._abort(list(self.scheduler.in_flight()), "aborted by /abort_request")

    def pause(self, mode: PauseMode) -> None:
        """Stop making steps. Idempotent; a second call may go from in_place to retract or abort."""
        self.scheduler.pause()
        if mode is PauseMode.ABORT:
            self._abort(list(self.scheduler.in_flight()), "aborted by /pause_generation")
        elif mode is PauseMode.RETRACT:
            self.scheduler.retract()
        self._settled.set()

    def resume(self) -> None:
        self.scheduler.release(resume=True)
        self._work.set()

    def flush_cache(self) -> None:
        """Nothing is cached between requests, so nothing is to be done. Raises: EngineRefused while busy, as SGLang."""
        if not self.scheduler.is_drained:
            num = sum(1 for _ in self.scheduler.in_flight())
            raise EngineRefused(f"flush_cache needs an idle engine, got {num} requests in flight: wait or abort them")

    async def update_weights(self, body: UpdateBody) -> int:
        """Change the weights, all or nothing; returns how many requests were paused meanwhile.

        Without a pause, what is in flight drains first under the old weights, and newcomers wait.

        Raises: EngineRefused where the folder's weights are not those of the served model, or a flush is asked for
            while requests keep their KV; nothing has changed then.
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
                self.weight_version = body.weight_version or self.weight_version
                self.model_path = body.model_path
                return sum(1 for _ in self.scheduler.in_flight()) if self.scheduler.paused else 0
            finally:
                self.scheduler.release(resume=False)
                self._work.set()

    def _step(self) -> bool:
        """One pass; returns whether a sequence finished."""
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
        """A stop string can only end within the last token, so a tail of one token a character is enough."""
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
