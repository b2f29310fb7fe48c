"""Prints progress lines with the remaining time, a few seconds apart, so that they are readable in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

_EVERY_S = 5.0


class Pace:
    """The progress of one stage. The remaining time is estimated from its mean rate so far."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._started_s = self._printed_s = time.monotonic()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Prints a line if the last line is _EVERY_S old or `done` == `total`."""
        now_s = time.monotonic()
        if done < total and now_s - self._printed_s < _EVERY_S:
            return
        self._printed_s = now_s
        spent_s = now_s - self._started_s
        left = f", {spent_s / max(1, done) * (total - done):.0f} s left" if done < total else f" in {spent_s:.0f} s"
        click.echo(f"  {self._stage}: {done}/{total}{left}{f' ({what})' if what else ''}")

    def of_steps(self, total: int) -> Callable[[str, int, float], None]:
        """A callback for training: it is called with (phase, steps done, mean loss)."""
        return lambda _phase, done, loss: self(done, total, f"loss {loss:.2f}")
