"""Counts FAILED trajectories by reason, in bounded memory. Actors and the learner use the same rules.

Two reasons are counted as one if they differ only in numbers, quoted words, addresses or ids: such parts differ between
trajectories although the cause is the same. The first text of each reason is the one that is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_REASON_CHARS = 300
MAX_SENT_REASONS = 16
OTHER = "other reasons"

_KEY_CHARS = 200
# In this order: addresses, then quoted words, ids, numbers. Line numbers of code and HTTP status codes are kept.
_VARYING = re.compile(
    r"(?P<kept>\bline \d+|\bHTTP \d{3}\b)"
    r"|\w+://[^\s,;)]+"
    r"|(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"|`[^`]*`"
    r"|\b0x[0-9a-f]+\b"
    r"|\b(?=[0-9a-f-]*\d)[0-9a-f]{8,}(?:-[0-9a-f]+)*\b"
    r"|\d+(?:[.,:_]\d+)*(?:e[+-]?\d+)?",
    re.IGNORECASE,
)


def clean_reason(text: str) -> str:
    """The text as one line of at most MAX_REASON_CHARS printable characters that UTF-8 can encode; never empty."""
    line = " ".join(text[: 8 * MAX_REASON_CHARS].split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    if len(line) > MAX_REASON_CHARS:
        line = f"{line[: MAX_REASON_CHARS - 1]}…"
    return line or "no reason given"


def reason_key(reason: str) -> str:
    """The same for two reasons that differ only in numbers, quoted words, addresses and ids."""
    return _VARYING.sub(lambda match: match["kept"] or "#", reason)[:_KEY_CHARS]


class FailureCounts:
    """Reason → number of trajectories, for at most `max_reasons` reasons; the others are counted together.

    When a reason is one too many, the least frequent one joins the others, the oldest one of several: a reason that is
    frequent from some time on is kept, however many rare ones came before it.
    """

    def __init__(self, *, max_reasons: int = 64) -> None:
        self._max_reasons = max_reasons
        self._counts: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self.num_other = 0

    @property
    def total(self) -> int:
        """The number of trajectories."""
        return sum(self._counts.values()) + self.num_other

    def add(self, reason: str, count: int = 1) -> None:
        """Counts `count` trajectories that failed for `reason`. For OTHER, `count` may be negative."""
        if reason == OTHER:
            self.num_other = max(0, self.num_other + count)
            return
        reason = clean_reason(reason)
        key = reason_key(reason)
        self._texts.setdefault(key, reason)
        self._counts[key] = self._counts.get(key, 0) + count
        if len(self._counts) > self._max_reasons:
            rarest = min((each for each in self._counts if each != key), key=self._counts.__getitem__)
            self.num_other += self._counts.pop(rarest)
            del self._texts[rarest]

    def most_common(self, num: int = MAX_SENT_REASONS) -> dict[str, int]:
        """At most `num` entries, most frequent first: reason → count. The last may be OTHER, so no count is lost."""
        ranked = sorted(self._counts.items(), key=lambda item: -item[1])
        if len(ranked) > num or (self.num_other and len(ranked) == num):
            ranked = ranked[: num - 1]
        rest = self.total - sum(count for _, count in ranked)
        named = {self._texts[key]: count for key, count in ranked}
        return {**named, OTHER: rest} if rest else named


def failure_line(failures: Mapping[str, int]) -> str:
    """`412 failed: retriever timeout after 30 s (398), … (14)`; empty if nothing failed."""
    if not failures:
        return ""
    parts = ", ".join(f"{reason} ({count})" for reason, count in failures.items())
    return f"{sum(failures.values())} failed: {parts}"
