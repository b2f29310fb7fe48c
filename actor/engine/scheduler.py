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

from actor.engine.prefix_index import Prefix, PrefixIndex, block_hashes, shared_length
from actor.engine.sequence import FinishType, Sequence

# Queue capacity per cache row. In a longer queue a request would wait longer than its client's time-out, so it is
# refused at once and the client can try another engine. This also bounds the memory of the queue.
_QUEUE_CAPACITY_PER_ROW = 32
# Smallest queue capacity, for engines with few rows: room for several actors and an evaluation.
MIN_QUEUE_CAPACITY = 1_024


Copy = tuple[int, int]
"""(source row, target row) of the cache."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass.

    Rows 0..len(decode)-1 decode one token each; the rows after them are prefilled. Before the pass, rows of the cache
    are copied, in this order. Each copy is (source row, target row); sources and targets of a kind are disjoint:

    saves  rows of the previous step to saved rows, at most `save_length` tokens each
    moves  rows to rows of finished sequences, so that the rows stay dense
    loads  saved rows to rows of `prefill`: their first `prefix_lengths` tokens are not computed again
    """

    saves: tuple[Copy, ...]
    save_length: int
    moves: tuple[Copy, ...]
    loads: tuple[Copy, ...]
    prefix_lengths: tuple[int, ...]
    decode: tuple[Sequence, ...]
    prefill: tuple[Sequence, ...]


@dataclass(slots=True)
class Scheduler:
    """Admits sequences in their order of arrival, each only if there is room for its longest possible output.

    So memory never runs out for a running sequence: retractions happen only on request. `min_queue_capacity` bounds
    `queue_capacity` from below. The order has one exception: a sequence waits one step if most of its tokens are
    computed in this step for another sequence; then they are loaded.

    num_saved_rows  cache rows after the first `max_running_requests`, which hold prefixes (see `PrefixIndex`)
    epoch           number of calls of `forget_prefixes`
    """

    max_running_requests: int
    max_total_tokens: int
    max_prefill_tokens: int
    min_queue_capacity: int = MIN_QUEUE_CAPACITY
    num_saved_rows: int = 0
    held: deque[Sequence] = field(default_factory=deque)
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    holding: bool = False
    paused: bool = False
    epoch: int = 0
    _first_new_row: int = 0
    """Rows of `running` from this one on were prefilled in the last step."""

    _prefixes: PrefixIndex = field(init=False)

    def __post_init__(self) -> None:
        self._prefixes = PrefixIndex(first_row=self.max_running_requests, num_rows=self.num_saved_rows)

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

    def forget_prefixes(self) -> None:
        """Call it when the weights change: nothing in the cache is loaded or saved for later sequences."""
        self.epoch += 1
        self._prefixes.clear()

    def drop_finished(self) -> None:
        """Removes finished sequences from the queues. Finished sequences with a row are removed by the next step."""
        for group in (self.waiting, self.held):
            unfinished = [sequence for sequence in group if sequence.finish is None]
            group.clear()
            group.extend(unfinished)

    def next_step(self) -> Step | None:
        """Returns the next forward pass, None if there is nothing to run. Updates `running` as if it had run."""
        if not self.has_work:
            return None
        saves, save_length = self._save_rows()
        moves = self._compact()
        decode = tuple(self.running)
        prefill, prefixes = self._admit()
        self._first_new_row = len(decode)
        self.running.extend(prefill)
        loads = [(prefix.row, row) for row, prefix in enumerate(prefixes, start=len(decode)) if prefix is not None]
        return Step(
            saves=saves,
            save_length=save_length,
            moves=moves,
            loads=tuple(loads),
            prefix_lengths=tuple(prefix.length if prefix else 0 for prefix in prefixes),
            decode=decode,
            prefill=tuple(prefill),
        )

    def _save_rows(self) -> tuple[tuple[Copy, ...], int]:
        """Chooses saved rows for the prompts of the last step and for finished sequences. Returns the copies and the
        length of the longest. The last token of a sequence is not in the cache."""
        source_of: dict[int, int] = {}
        longest = 0
        for row, sequence in enumerate(self.running):
            finish = sequence.finish
            if (finish is None and row < self._first_new_row) or sequence.cache_epoch != self.epoch:
                continue
            if not sequence.shares_prefixes or (finish is not None and finish.type is FinishType.ABORT):
                continue
            if (target := self._prefixes.save(sequence.tokens[:-1])) is not None:
                source_of[target] = row
                longest = max(longest, sequence.num_tokens - 1)
        return tuple((row, target) for target, row in source_of.items()), longest

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

    def _admit(self) -> tuple[list[Sequence], list[Prefix | None]]:
        """Takes sequences from the queue while there are free rows, free tokens and budget for padded prefill tokens.
        Returns them and their saved prefixes.

        The budget does not apply to the first one, so that a prompt longer than the budget is admitted too.
        """
        admitted: list[Sequence] = []
        prefixes: list[Prefix | None] = []
        postponed: list[Sequence] = []
        computed: set[int] = set()
        num_reserved = sum(sequence.num_reserved_tokens for sequence in self.running)
        longest = 0
        while self.waiting and len(self.running) + len(admitted) < self.max_running_requests:
            sequence = self.waiting[0]
            known = sequence.tokens[:-1] if self.num_saved_rows and sequence.shares_prefixes else []
            hashes = block_hashes(known)
            prefix = self._prefixes.find(known, hashes)
            num_computed = sequence.num_tokens - (prefix.length if prefix else 0)
            if 2 * (shared_length(hashes, computed) - sequence.num_tokens + num_computed) > num_computed:
                postponed.append(self.waiting.popleft())
                continue
            longest = max(longest, num_computed)
            over_budget = admitted and (len(admitted) + 1) * longest > self.max_prefill_tokens
            if num_reserved + sequence.num_reserved_tokens > self.max_total_tokens or over_budget:
                break
            num_reserved += sequence.num_reserved_tokens
            sequence.cache_epoch, sequence.num_cached_tokens = self.epoch, sequence.num_tokens - num_computed
            computed.update(hashes)
            admitted.append(self.waiting.popleft())
            prefixes.append(prefix)
        self.waiting.extendleft(reversed(postponed))
        return admitted, prefixes
