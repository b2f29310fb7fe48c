"""samples.jsonl: one line per finished trajectory. Lines are appended, and read one at a time."""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import FiniteFloat, ValidationError

from actor.episode import Episode
from protocol.atomic_write import atomic_path
from protocol.config_base import NonNegative, Section
from protocol.errors import DataError
from protocol.framing import describe
from protocol.types import Question, Status, Trajectory

_BLOCK_BYTES = 1 << 16
_LOCK_POLL_S = 0.1


class Sample(Section):
    """One trajectory of one question, as a line of samples.jsonl.

    cursor, sample  the question's number and the sample's number, both from 0
    reward          None if the trajectory FAILED
    versions        the weight versions that sampled its tokens, as the engines state them
    num_tokens      of all contexts
    contexts        the text of each context; None unless the plan has `transcripts`
    memories        the memory at the start of each context, except the first; None unless the plan has `transcripts`
    """

    cursor: NonNegative
    sample: NonNegative
    id: str
    question: str
    answers: tuple[str, ...]
    answer: str | None
    status: Status
    reason: str
    reward: FiniteFloat | None
    parts: dict[str, FiniteFloat]
    stats: dict[str, FiniteFloat]
    versions: tuple[str, ...]
    num_contexts: NonNegative
    num_tokens: NonNegative
    contexts: tuple[str, ...] | None = None
    memories: tuple[str, ...] | None = None

    @property
    def is_failed(self) -> bool:
        return self.status is Status.FAILED

    def to_line(self) -> bytes:
        """The line, with its newline."""
        return self.model_dump_json().encode() + b"\n"


def sample_of(
    question: Question, trajectory: Trajectory, episode: Episode, *, cursor: int, sample: int, transcripts: bool
) -> Sample:
    """The line of a finished trajectory. Raises: ValueError if user code gave values that JSON cannot hold."""
    failed = trajectory.status is Status.FAILED
    stats = {str(name): float(value) for name, value in trajectory.stats.items()}
    return Sample(
        cursor=cursor,
        sample=sample,
        id=_text(question.id),
        question=_text(question.text),
        answers=tuple(map(_text, question.answers)),
        answer=None if episode.answer is None else _text(episode.answer),
        status=trajectory.status,
        reason=_text(episode.reason),
        reward=None if failed else float(trajectory.reward),
        parts={} if failed else {_text(name): float(value) for name, value in trajectory.reward_parts.items()},
        stats={name: value for name, value in stats.items() if not failed or math.isfinite(value)},
        versions=episode.weight_versions,
        num_contexts=len(trajectory.contexts),
        num_tokens=trajectory.num_tokens,
        contexts=tuple(map(_text, episode.transcripts)) if transcripts else None,
        memories=tuple(map(_text, episode.memories)) if transcripts else None,
    )


def failed_sample(question: Question, reason: str, *, cursor: int, sample: int) -> Sample:
    """The line of a trajectory that could not be run or recorded."""
    episode = Episode(status=Status.FAILED, reason=reason)
    trajectory = Trajectory(contexts=(), reward=0.0, status=Status.FAILED)
    return sample_of(question, trajectory, episode, cursor=cursor, sample=sample, transcripts=False)


class SampleFile:
    """Appends lines to samples.jsonl, which one process at a time may have open. An async context manager.

    Opening cuts a last line without an end, which a killed process left. A line is handed to the kernel by `append`,
    and is on the disk after `sync`. `lock_wait_s`: longest wait for another process that has the file open; the
    evaluator of a launcher that was killed takes a moment to end.
    """

    def __init__(self, path: Path, *, lock_wait_s: float) -> None:
        self._path = path
        self._lock_wait_s = lock_wait_s
        self._file: BinaryIO | None = None

    async def __aenter__(self) -> SampleFile:
        """Raises: DataError if the file cannot be written, or another evaluation writes it."""
        deadline = asyncio.get_running_loop().time() + self._lock_wait_s
        while not self._open():
            if asyncio.get_running_loop().time() >= deadline:
                raise DataError(f"another evaluation writes {self._path}: wait for it, or choose another folder")
            await asyncio.sleep(_LOCK_POLL_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def read(self) -> Iterator[Sample]:
        """The lines, one at a time. Raises: DataError if a line is damaged."""
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield Sample.model_validate_json(line)
                except ValidationError as error:
                    raise DataError(
                        f"{self._path}:{number} is damaged: {describe(error)}; delete the line, or start anew with "
                        "--overwrite"
                    ) from error

    def drop_failed(self) -> int:
        """Removes the lines of FAILED trajectories, which are to be run again; returns their number."""
        num_failed = sum(sample.is_failed for sample in self.read())
        if num_failed:
            with atomic_path(self._path) as temporary, temporary.open("wb") as kept:
                for sample in self.read():
                    if not sample.is_failed:
                        kept.write(sample.to_line())
                kept.flush()
                os.fsync(kept.fileno())
            self._close()
            if not self._open():
                raise DataError(f"another evaluation writes {self._path}")
        return num_failed

    def append(self, sample: Sample) -> None:
        """Raises: DataError if the disk cannot be written."""
        try:
            self._opened.write(sample.to_line())
            self._opened.flush()
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Waits until the lines are on the disk. Raises: DataError."""
        try:
            os.fsync(self._opened.fileno())
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error.strerror}") from error

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError("SampleFile must be used inside `with`")
        return self._file

    def _open(self) -> bool:
        """Opens and locks the file. Returns False if another process has locked it. Raises: DataError."""
        try:
            file = self._path.open("a+b")
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        file.truncate(_end_of_last_line(file))
        self._file = file
        return True

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _end_of_last_line(file: BinaryIO) -> int:
    """The position after the last newline; 0 if there is none."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - _BLOCK_BYTES)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _text(text: str) -> str:
    """The text, with the parts that UTF-8 cannot encode (halves of surrogate pairs) as escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()
