"""How much of a server's time each peer gets. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

# What a peer may spend: a message costs 1, and 1 for each 4 KiB of its header; one that had to be refused, much more.
RATE_PER_S = 10_000.0
BURST = 20_000.0
REFUSAL_COST = 1_000.0
_BYTES_PER_TOKEN = 4096
# A peer that is silent has all it may have again soon: to forget the longest silent of so many forgives nothing.
_MAX_PEERS = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class RateLimit:
    """A token bucket for each peer: BURST tokens at most, into which RATE_PER_S flow."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()

    def admits(self, peer: bytes, *, header_bytes: int, now_s: float) -> bool:
        """False while the peer has spent what it had; what is not admitted costs nothing."""
        bucket = self._bucket(peer, now_s)
        if bucket.tokens <= 0:
            return False
        bucket.tokens -= 1 + header_bytes // _BYTES_PER_TOKEN
        return True

    def refuse(self, peer: bytes, *, now_s: float) -> None:
        """A message that was admitted could not be read: a few may be a defect, many are hostile."""
        self._bucket(peer, now_s).tokens -= REFUSAL_COST

    def _bucket(self, peer: bytes, now_s: float) -> _Bucket:
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = _Bucket(BURST, now_s)
            if len(self._buckets) > _MAX_PEERS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(peer)
            bucket.tokens = min(BURST, bucket.tokens + (now_s - bucket.at_s) * RATE_PER_S)
            bucket.at_s = now_s
        return bucket
