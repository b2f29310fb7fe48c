"""Rate limit of each peer of a server: a token bucket. Pure: the caller passes the time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

# Tokens per peer. A message costs 1, plus 1 for each 4 KiB of its header; a message that is refused costs much more.
RATE_PER_S = 10_000.0
BURST = 20_000.0
REFUSAL_COST = 1_000.0
_BYTES_PER_TOKEN = 4096
# Evicting the least recently used bucket is safe: idle buckets have refilled.
MAX_PEERS = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class RateLimit:
    """A token bucket for each peer: it holds at most BURST tokens and gains RATE_PER_S tokens per second."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()

    @property
    def num_peers(self) -> int:
        """The number of peers that have a bucket; at most MAX_PEERS."""
        return len(self._buckets)

    def admits(self, peer: bytes, *, header_bytes: int, now_s: float) -> bool:
        """Charges a message and returns True, or returns False and charges nothing if the bucket is empty."""
        bucket = self._bucket(peer, now_s)
        if bucket.tokens <= 0:
            return False
        bucket.tokens -= 1 + header_bytes // _BYTES_PER_TOKEN
        return True

    def penalize(self, peer: bytes, *, now_s: float) -> None:
        """Charges REFUSAL_COST for a message that was admitted but could not be decoded.

        A few such messages may be caused by a defect; many mean that the peer is hostile.
        """
        self._bucket(peer, now_s).tokens -= REFUSAL_COST

    def _bucket(self, peer: bytes, now_s: float) -> _Bucket:
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = _Bucket(BURST, now_s)
            if len(self._buckets) > MAX_PEERS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(peer)
            bucket.tokens = min(BURST, bucket.tokens + (now_s - bucket.at_s) * RATE_PER_S)
            bucket.at_s = now_s
        return bucket
