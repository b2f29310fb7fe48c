"""Rate limit of each peer of a server: a token bucket. Pure: the caller passes the time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

# A message costs 1 token, 1 more for each 4 KiB of its header and for each 256 KiB in all.
_HEADER_BYTES_PER_TOKEN = 4 << 10
_BYTES_PER_TOKEN = 256 << 10
# A message that cannot be decoded costs the tokens of 0.1 s.
_REFUSAL_S = 0.1
# New peers start with a quarter of a pool, so that reconnecting under new identities gains nothing.
_NEWCOMER_SHARE = 1 / 4
_POOL_PER_BURST = 1.2
_POOL_RATE_PER_RATE = 0.1
_NEWCOMER_MIN = 1.0
# A peer is flooding after this many dropped messages; the count restarts when its bucket is half full again.
FLOODING_AFTER = 500
# Evicting the least recently used bucket is safe: idle buckets have refilled.
MAX_PEERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRate:
    """Tokens of each peer of one socket: `per_s` are added per second, up to `burst`."""

    per_s: float = 2_000.0
    burst: float = 20_000.0

    @property
    def refusal_cost(self) -> float:
        return self.per_s * _REFUSAL_S

    @property
    def newcomer_pool(self) -> float:
        """Tokens for all new peers together."""
        return self.burst * _POOL_PER_BURST

    @property
    def newcomer_per_s(self) -> float:
        return self.per_s * _POOL_RATE_PER_RATE


class Admission(Enum):
    """What to do with a message: handle it, drop it, or drop it and close its connection."""

    ADMITTED = "admitted"
    DROPPED = "dropped"
    FLOODING = "flooding"


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float
    num_dropped: int = 0


class RateLimit:
    """A token bucket for each peer."""

    def __init__(self, rate: PeerRate | None = None) -> None:
        self.rate = rate or PeerRate()
        self._buckets: OrderedDict[bytes, _Bucket] = OrderedDict()
        self._pool = _Bucket(self.rate.newcomer_pool, 0.0)

    @property
    def num_peers(self) -> int:
        """The number of peers that have a bucket; at most MAX_PEERS."""
        return len(self._buckets)

    def admit(self, peer: bytes, *, header_bytes: int, num_bytes: int = 0, now_s: float) -> Admission:
        """Charges a message of `num_bytes` bytes if the peer's bucket is not empty, else charges nothing."""
        bucket = self._bucket(peer, now_s)
        if bucket.tokens <= 0:
            bucket.num_dropped += 1
            return Admission.FLOODING if bucket.num_dropped > FLOODING_AFTER else Admission.DROPPED
        bucket.tokens -= 1 + header_bytes // _HEADER_BYTES_PER_TOKEN + num_bytes // _BYTES_PER_TOKEN
        return Admission.ADMITTED

    def penalize(self, peer: bytes, *, now_s: float) -> None:
        """Charges `refusal_cost` for a message that was admitted but could not be decoded.

        A few such messages may be caused by a defect; many mean that the peer is hostile.
        """
        self._bucket(peer, now_s).tokens -= self.rate.refusal_cost

    def _bucket(self, peer: bytes, now_s: float) -> _Bucket:
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = _Bucket(self._newcomer_tokens(now_s), now_s)
            if len(self._buckets) > MAX_PEERS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(peer)
            _refill(bucket, now_s, rate_per_s=self.rate.per_s, limit=self.rate.burst)
            if bucket.tokens >= self.rate.burst / 2:
                bucket.num_dropped = 0
        return bucket

    def _newcomer_tokens(self, now_s: float) -> float:
        _refill(self._pool, now_s, rate_per_s=self.rate.newcomer_per_s, limit=self.rate.newcomer_pool)
        tokens = self._pool.tokens * _NEWCOMER_SHARE
        self._pool.tokens -= tokens
        return max(tokens, _NEWCOMER_MIN)


def _refill(bucket: _Bucket, now_s: float, *, rate_per_s: float, limit: float) -> None:
    bucket.tokens = min(limit, bucket.tokens + (now_s - bucket.at_s) * rate_per_s)
    bucket.at_s = now_s
