"""Lines of progress with the time that is left, a few seconds apart, so that a log of them can be read too."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

_EVERY_S = 5.0


class Pace:
    """Of one stage. Its rate is its own mean so far."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._started_s = self._said_s = time.monotonic()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` are done; prints where the last line is old, or all are done."""
        now_s = time.monotonic()
        if done < total and now_s - self._said_s < _EVERY_S:
            return
        self._said_s = now_s
        spent_s = now_s - self._started_s
        left = f", {spent_s / max(1, done) * (total - done):.0f} s left" if done < total else f" in {spent_s:.0f} s"
        click.echo(f"  {self._stage}: {done}/{total}{left}{f' ({what})' if what else ''}")

    def of_steps(self, total: int) -> Callable[[str, int, float], None]:
        """For training: what is called with (phase, steps done, mean loss)."""
        return lambda _phase, done, loss: self(done, total, f"loss {loss:.2f}")
