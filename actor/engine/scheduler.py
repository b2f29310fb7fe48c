"""Decides which sequences the next step runs. Pure: no torch, no clock, no I/O.

    held ──end_hold, resume──▶ waiting ──admit──▶ running ──finish──▶ removed
                                  ▲                  │
                                  └─────retract──────┘

`held` receives new sequences while generation is paused, or while an update waits for the engine to drain. The running
sequences occupy cache rows 0..n-1 without gaps: the row of a sequence is its index in `running`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from actor.engine.sequence import Sequence

# Queue capacity per cache row. In a longer queue a request would wait longer than its client's time-out, so it is
# refused at once and the client can try another engine. This also bounds the memory of the queue.
_QUEUE_CAPACITY_PER_ROW = 32
# Smallest queue capacity, for engines with few rows: room for several actors and an evaluation.
MIN_QUEUE_CAPACITY = 1_024


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass.

    `moves`: disjoint (source row, target row), to be made before the pass so that the rows stay dense. Rows
    0..len(decode)-1 decode one token each; the rows after them are prefilled.
    """

    moves: tuple[tuple[int, int], ...]
    decode: tuple[Sequence, ...]
    prefill: tuple[Sequence, ...]


@dataclass(slots=True)
class Scheduler:
    """Admits sequences in their order of arrival, each only if there is room for its longest possible output.

    So memory never runs out for a running sequence: retractions happen only on request. `min_queue_capacity` bounds
    `queue_capacity` from below.
    """

    max_running_requests: int
    max_total_tokens: int
    max_prefill_tokens: int
    min_queue_capacity: int = MIN_QUEUE_CAPACITY
    held: deque[Sequence] = field(default_factory=deque)
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    holding: bool = False
    paused: bool = False

    def in_flight(self) -> Iterator[Sequence]:
        """Yields every unfinished sequence, held ones included."""
        for group in (self.running, self.waiting, self.held):
            yield from (sequence for sequence in group if sequence.finish is None)

    @property
    def num_running(self) -> int:
        return sum(sequence.finish is None for sequence in self.running)

    @property
    def queue_capacity(self) -> int:
        return max(self.min_queue_capacity, _QUEUE_CAPACITY_PER_ROW * self.max_running_requests)

    @property
    def queue_room(self) -> int:
        """How many more sequences may queue. May be negative: retracted sequences queue beyond the capacity."""
        return self.queue_capacity - len(self.waiting) - len(self.held)

    @property
    def is_drained(self) -> bool:
        """Whether no sequence runs or waits. Held sequences do not count."""
        return not self.waiting and self.num_running == 0

    @property
    def has_work(self) -> bool:
        return not self.paused and not self.is_drained

    def add(self, sequence: Sequence) -> None:
        (self.held if self.holding or self.paused else self.waiting).append(sequence)

    def hold(self) -> None:
        """Holds new sequences until `end_hold`, while those that run or wait finish."""
        self.holding = True

    def end_hold(self) -> None:
        self.holding = False
        self._queue_held()

    def pause(self) -> None:
        """Stops making steps and holds new sequences until `resume`."""
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self._queue_held()

    def _queue_held(self) -> None:
        """Moves held sequences to the queue, unless the scheduler still holds or is paused."""
        if not self.paused and not self.holding:
            self.waiting.extend(self.held)
            self.held.clear()

    def retract(self) -> int:
        """Moves the running sequences, without their cache rows, to the front of the queue. Returns how many."""
        unfinished = [sequence for sequence in self.running if sequence.finish is None]
        for sequence in unfinished:
            sequence.num_retractions += 1
        self.waiting.extendleft(reversed(unfinished))
        self.running.clear()
        return len(unfinished)

    def drop_finished(self) -> None:
        """Removes finished sequences from the queues. Finished sequences with a row are removed by the next step."""
        for group in (self.waiting, self.held):
            unfinished = [sequence for sequence in group if sequence.finish is None]
            group.clear()
            group.extend(unfinished)

    def next_step(self) -> Step | None:
        """Returns the next forward pass, None if there is nothing to run. Updates `running` as if it had run."""
        if self.paused:
            return None
        moves = self._compact()
        decode = tuple(self.running)
        prefill = tuple(self._admit())
        self.running.extend(prefill)
        if not self.running:
            return None
        return Step(moves=moves, decode=decode, prefill=prefill)

    def _compact(self) -> tuple[tuple[int, int], ...]:
        """Moves the last rows into the rows of finished sequences. Returns the moves."""
        rows = self.running
        num_unfinished = self.num_running
        if num_unfinished == len(rows):
            return ()
        holes = [row for row in range(num_unfinished) if rows[row].finish is not None]
        tail = [row for row in range(num_unfinished, len(rows)) if rows[row].finish is None]
        moves = tuple(zip(tail, holes, strict=True))
        for source, target in moves:
            rows[target] = rows[source]
        del rows[num_unfinished:]
        return moves

    def _admit(self) -> list[Sequence]:
        """Takes sequences from the queue while there are free rows, free tokens and budget for padded prefill tokens.

        The budget does not apply to the first one, so that a prompt longer than the budget is admitted too.
        """
        admitted: list[Sequence] = []
        num_reserved = sum(sequence.num_reserved_tokens for sequence in self.running)
        longest = 0
        while self.waiting and len(self.running) + len(admitted) < self.max_running_requests:
            sequence = self.waiting[0]
            num_reserved += sequence.num_reserved_tokens
            longest = max(longest, sequence.num_tokens)
            over_budget = admitted and (len(admitted) + 1) * longest > self.max_prefill_tokens
            if num_reserved > self.max_total_tokens or over_budget:
                break
            admitted.append(self.waiting.popleft())
        return admitted
