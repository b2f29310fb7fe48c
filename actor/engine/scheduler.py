"""Which sequences the next step runs, as pure bookkeeping: no torch, no clock, no I/O.

    held ──release──▶ waiting ──admit──▶ running ──finish──▶ gone
                         ▲                  │
                         └─────retract──────┘

`held` collects what arrives while generation is paused or an update waits for the engine to drain. The running
sequences occupy cache rows 0..n-1 without holes; the row of a sequence is its index in `running`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from actor.engine.request import Sequence

# Requests that may queue for each that may run. One that finds more rounds than that before it would wait longer than
# its client does: refused at once, it can go to another engine, and what queues cannot come to fill the memory.
_NUM_QUEUED_PER_ROW = 32
# But always as many as some actors and an evaluation bring, however few rows an engine has.
_MIN_QUEUED = 1_024


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass.

    `moves` are (source row, target row), disjoint, to be made before the pass so that the rows stay dense. Rows
    0..len(decode)-1 decode one token each, and the rows after them are filled from scratch.
    """

    moves: tuple[tuple[int, int], ...]
    decode: tuple[Sequence, ...]
    prefill: tuple[Sequence, ...]


@dataclass(slots=True)
class Scheduler:
    """Admits first come, first served; a sequence is admitted only with room for its longest possible output.

    So a running sequence is never pushed out for want of memory: retractions happen on request only.
    """

    max_running_requests: int
    max_total_tokens: int
    max_prefill_tokens: int
    held: deque[Sequence] = field(default_factory=deque)
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    holding: bool = False
    paused: bool = False

    def in_flight(self) -> Iterator[Sequence]:
        """Everything that has not finished, the held ones included."""
        for group in (self.running, self.waiting, self.held):
            yield from (sequence for sequence in group if sequence.finish is None)

    @property
    def num_running(self) -> int:
        return sum(sequence.finish is None for sequence in self.running)

    @property
    def max_queued(self) -> int:
        return max(_MIN_QUEUED, _NUM_QUEUED_PER_ROW * self.max_running_requests)

    @property
    def num_free(self) -> int:
        """How many newcomers may queue. What an update retracts queues up beyond the bound, so it may be negative."""
        return self.max_queued - len(self.waiting) - len(self.held)

    @property
    def is_drained(self) -> bool:
        """Whether nothing runs or waits; held sequences do not count."""
        return not self.waiting and self.num_running == 0

    @property
    def has_work(self) -> bool:
        return not self.paused and not self.is_drained

    def add(self, sequence: Sequence) -> None:
        (self.held if self.holding or self.paused else self.waiting).append(sequence)

    def hold(self) -> None:
        """Let what is in flight drain, and keep newcomers out until `release`."""
        self.holding = True

    def pause(self) -> None:
        self.paused = True

    def release(self, *, resume: bool) -> None:
        """End a hold or, with `resume`, a pause. Held sequences queue up once neither is on."""
        if resume:
            self.paused = False
        else:
            self.holding = False
        if not self.paused and not self.holding:
            self.waiting.extend(self.held)
            self.held.clear()

    def retract(self) -> int:
        """Running sequences give up their cache rows and queue up first, in their order; returns how many did."""
        alive = [sequence for sequence in self.running if sequence.finish is None]
        for sequence in alive:
            sequence.num_retractions += 1
        self.waiting.extendleft(reversed(alive))
        self.running.clear()
        return len(alive)

    def drop_finished(self) -> None:
        """Forget finished sequences that wait; those with a row leave it at the next step."""
        for group in (self.waiting, self.held):
            alive = [sequence for sequence in group if sequence.finish is None]
            group.clear()
            group.extend(alive)

    def next_step(self) -> Step | None:
        """The next pass, or None where there is nothing to run. Updates `running` as if the pass were done."""
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
        """Close the holes that finished sequences left with the last rows."""
        rows = self.running
        num_alive = self.num_running
        if num_alive == len(rows):
            return ()
        holes = [row for row in range(num_alive) if rows[row].finish is not None]
        tail = [row for row in range(num_alive, len(rows)) if rows[row].finish is None]
        moves = tuple(zip(tail, holes, strict=True))
        for source, target in moves:
            rows[target] = rows[source]
        del rows[num_alive:]
        return moves

    def _admit(self) -> list[Sequence]:
        """Take from the queue while rows, tokens and the budget of padded prefill tokens allow; at least the
        first is not held up by the budget, so that a long prompt gets its turn."""
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
