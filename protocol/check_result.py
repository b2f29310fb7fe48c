"""The results of checks before a start, which processes print one a line and `palimpsest check` collects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from protocol.errors import ConfigError, UserError

Outcome = Literal["ok", "warn", "fail"]
_LINE = re.compile(rf"^({'|'.join(get_args(Outcome))}) +(\S.*?)  +(.*)$")
_SUBJECT_CHARS = 20


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`subject`: a config key or a few words, without two spaces in a row. `message`: what was found, what to do."""

    outcome: Outcome
    subject: str
    message: str

    def __str__(self) -> str:
        message = " ".join(self.message.split())
        return f"{self.outcome:<4}  {self.subject:<{_SUBJECT_CHARS}}  {message}"

    @classmethod
    def parse(cls, line: str) -> CheckResult | None:
        """The result that `str` printed; None if the line is something else."""
        match = _LINE.match(line.rstrip())
        if match is None:
            return None
        outcome, subject, message = match.groups()
        return cls(outcome, subject, message)  # pyright: ignore[reportArgumentType]


def attempt(subject: str, check: Callable[[], str]) -> CheckResult:
    """Runs a check that returns what it found. A UserError is a failure."""
    try:
        return CheckResult("ok", subject, check())
    except UserError as error:
        return CheckResult("fail", subject, str(error).removeprefix(f"{subject}: "))


def raise_first_failure(results: Iterable[CheckResult]) -> None:
    """Raises: ConfigError with the message of the first failure, if there is one."""
    for result in results:
        if result.outcome == "fail":
            raise ConfigError(result.message)
