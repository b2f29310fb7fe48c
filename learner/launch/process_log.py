"""The log file of one process: written by the launcher from a pipe, with a limited size.

    process ── stdout and stderr: pipe ──► reader thread ──► logs/NAME.log ──at max_bytes──► logs/NAME.log.1

The process never writes to the disk itself, so a full disk cannot end it: what does not fit is dropped and counted.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

# Two files of this size per process.
MAX_BYTES = 64 << 20
_TAIL_BYTES = 64 << 10
_CHUNK_BYTES = 64 << 10
# Time for the last output of a process that has ended; its own children may hold the pipe open.
_LAST_OUTPUT_TIMEOUT_S = 2.0


class ProcessLog:
    """Not thread-safe, except that the reader thread runs beside the caller."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._reader: threading.Thread | None = None
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._num_dropped_bytes = 0

    def open_pipe(self) -> int:
        """Returns the write end of a new pipe for the process's next life; the caller closes it after the start."""
        self.wait_for_last_output()
        with suppress(OSError):
            self.path.touch()
        read_end, write_end = os.pipe()
        self._reader = threading.Thread(target=self._copy, args=(read_end,), name=f"log {self.path.stem}", daemon=True)
        self._reader.start()
        return write_end

    def wait_for_last_output(self) -> None:
        """Waits until the output of a process that has ended is in the file; at most _LAST_OUTPUT_TIMEOUT_S."""
        if self._reader is not None:
            self._reader.join(_LAST_OUTPUT_TIMEOUT_S)

    def last_lines(self) -> list[str]:
        """The last lines that this launcher received, at most 64 KB; also those that the disk had no room for."""
        return b"".join(self._tail)[-_TAIL_BYTES:].decode(errors="replace").splitlines()

    def _copy(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while chunk := pipe.read(_CHUNK_BYTES):
                self._remember(chunk)
                left = memoryview(chunk)
                try:
                    self._start_new_file_before(len(chunk))
                    with io.FileIO(self.path, "ab") as file:
                        self._note_dropped_lines(file)
                        while left:
                            left = left[file.write(left) :]
                except OSError as error:
                    if not self._num_dropped_bytes:
                        log.warning("%s cannot be written (%s): its lines are dropped", self.path, error.strerror)
                    self._num_dropped_bytes += len(left)

    def _start_new_file_before(self, num_bytes: int) -> None:
        """Renames the file if `num_bytes` more would exceed its limit. Raises: OSError."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_size + num_bytes > self._max_bytes:
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))

    def _note_dropped_lines(self, file: io.FileIO) -> None:
        """States in the file how many bytes were dropped before. Raises: OSError."""
        if self._num_dropped_bytes:
            note = f"\n[{self._num_dropped_bytes} bytes are missing here: the disk was full]\n".encode()
            if file.write(note) == len(note):
                self._num_dropped_bytes = 0

    def _remember(self, chunk: bytes) -> None:
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail_bytes - len(self._tail[0]) >= _TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft())
