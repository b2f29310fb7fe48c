"""The retriever's service: answers many clients, one batch at a time.

    clients ──SearchRequest──▶ ROUTER ──admit──▶ pending ──take──▶ encode, search, pack ──▶ ROUTER ──▶ clients
                                 │               (bounded)         (one thread)
                                 └──ErrorReply if it is malformed, too large, or the queue is full

_receive  consumes requests from the ROUTER, produces pending entries; waits for a message
_work     consumes pending entries, produces replies; waits for `_arrived`, which `_receive` sets

A batch holds the requests that arrived while the previous batch was processed, up to `max_batch` queries. So batches
grow under load, and an idle service answers at once: it never waits for a batch to fill.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgpack
import numpy as np

from protocol.errors import MalformedMessage, ProtocolError, RemoteError
from protocol.framing import MAX_HEADER_BYTES, Buffer, decode, encode, expect
from protocol.search_messages import ErrorReply, SearchReply, SearchRequest
from protocol.transport import Router
from retriever.search import Query, Searcher

_MAX_REQUEST_ID = 1 << 62
# A client may use this fraction of the queue, so that a flood of one client does not fail the searches of others.
_MIN_CLIENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """Both count queries. `max_pending` bounds the queue's memory and waiting time; further requests are refused."""

    max_batch: int = 64
    max_pending: int = 4_096


@dataclass(slots=True)
class ServiceStats:
    """Counts since the start, and the latencies of the last 10,000 requests, from receipt to reply."""

    num_requests: int = 0
    num_queries: int = 0
    num_batches: int = 0
    num_refused: int = 0
    num_undelivered: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def summary(self) -> str:
        if not self.num_batches:
            return f"no query answered, {self.num_refused} refused"
        p50, p99 = np.percentile(np.fromiter(self.latencies_s, dtype=np.float64), [50, 99]) * 1e3
        return (
            f"{self.num_queries} queries of {self.num_requests} requests in {self.num_batches} batches "
            f"(mean {self.num_queries / self.num_batches:.1f}), p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
            f"{self.num_refused} refused, {self.num_undelivered} undelivered"
        )


@dataclass(frozen=True, slots=True)
class _Pending:
    peer: bytes
    request: SearchRequest
    received_s: float


class RetrieverService:
    """Answers SearchRequests on a bound ROUTER until it is cancelled."""

    def __init__(self, *, router: Router, searcher: Searcher, limits: ServiceLimits | None = None) -> None:
        self.stats = ServiceStats()
        self._router = router
        self._searcher = searcher
        self._limits = limits or ServiceLimits()
        self._pending: deque[_Pending] = deque()
        self._num_pending_queries = 0
        self._num_pending_of: Counter[bytes] = Counter()
        self._arrived = asyncio.Event()

    @property
    def address(self) -> str:
        return self._router.address

    async def run(self) -> None:
        """Serves until it is cancelled. An error of the encoder or the index ends it: `run` raises that error."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="retriever-search") as executor:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(), name="retriever-receive")
                tasks.create_task(self._work(executor), name="retriever-work")

    async def _receive(self) -> None:
        while True:
            peer, frames = await self._router.recv()
            try:
                request = self._admit(peer, frames)
            except (ProtocolError, RemoteError) as error:
                self.stats.num_refused += 1
                if isinstance(error, ProtocolError):
                    self._router.penalize(peer)
                reply = ErrorReply(request_id=request_id_of(frames), error=str(error))
                self._send(peer, encode(reply))
                continue
            self._pending.append(_Pending(peer, request, time.perf_counter()))
            self._num_pending_queries += len(request.queries)
            self._num_pending_of[peer] += len(request.queries)
            self._arrived.set()

    def _admit(self, peer: bytes, frames: Sequence[Buffer]) -> SearchRequest:
        """Raises: ProtocolError if the frames are not a valid search request; RemoteError if there is no such
        collection, or the queue is full.
        """
        message, payload = decode(frames)
        request = expect(message, SearchRequest)
        if payload:
            raise MalformedMessage(f"a search request has 1 frame, got {1 + len(payload)}")
        if not self._searcher.has(request.collection):
            raise RemoteError(
                f"there is no collection {request.collection!r}; there are {', '.join(self._searcher.names)}"
            )
        waiting = self._num_pending_queries
        if waiting and waiting + len(request.queries) > self._limits.max_pending:
            raise RemoteError(
                f"the retriever's queue is full: {waiting} queries wait, max_pending is {self._limits.max_pending}; "
                "send the request again later, or start more retrievers"
            )
        share = self._limits.max_pending // _MIN_CLIENTS
        if self._num_pending_of[peer] and self._num_pending_of[peer] + len(request.queries) > share:
            raise RemoteError(
                f"{self._num_pending_of[peer]} queries of this client wait, a client may have {share}: "
                "send the request again later"
            )
        return request

    async def _work(self, executor: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            replies = await loop.run_in_executor(executor, self._answer, [entry.request for entry in batch])
            self.stats.num_batches += 1
            for entry, reply in zip(batch, replies, strict=True):
                self._send(entry.peer, reply)
                self.stats.num_requests += 1
                self.stats.num_queries += len(entry.request.queries)
                self.stats.latencies_s.append(time.perf_counter() - entry.received_s)

    def _take(self) -> list[_Pending]:
        """The next batch: whole requests in order of arrival with at most `max_batch` queries, at least one request."""
        batch: list[_Pending] = []
        num_queries = 0
        while self._pending:
            size = len(self._pending[0].request.queries)
            if batch and num_queries + size > self._limits.max_batch:
                break
            entry = self._pending.popleft()
            batch.append(entry)
            num_queries += size
            self._num_pending_of[entry.peer] -= size
            if not self._num_pending_of[entry.peer]:
                del self._num_pending_of[entry.peer]
        self._num_pending_queries -= num_queries
        if not self._pending:
            self._arrived.clear()
        return batch

    def _answer(self, requests: Sequence[SearchRequest]) -> list[bytes]:
        """The encoded reply to each request. Runs in the executor's thread."""
        queries = [Query(text, request.top_n, request.collection) for request in requests for text in request.queries]
        results = iter(self._searcher.search(queries))
        replies: list[bytes] = []
        for request in requests:
            reply = encode(SearchReply(request_id=request.request_id, results=[next(results) for _ in request.queries]))
            if len(reply) > MAX_HEADER_BYTES:
                error = (
                    f"the reply must have <= {MAX_HEADER_BYTES} bytes, got {len(reply)}; "
                    "send fewer queries per request, or a smaller top_n"
                )
                reply = encode(ErrorReply(request_id=request.request_id, error=error))
            replies.append(reply)
        return replies

    def _send(self, peer: bytes, reply: bytes) -> None:
        if not self._router.send(peer, [reply]):
            self.stats.num_undelivered += 1


def request_id_of(frames: Sequence[Buffer]) -> int:
    """The id of a refused request, so that its client does not wait until its time-out; 0 if the frames have none."""
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        return 0
    try:
        fields = msgpack.unpackb(frames[0], raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
        return 0
    request_id = fields.get("request_id") if isinstance(fields, dict) else None
    if not isinstance(request_id, int) or isinstance(request_id, bool):
        return 0
    return request_id if 0 <= request_id < _MAX_REQUEST_ID else 0
