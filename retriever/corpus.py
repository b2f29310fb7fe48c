"""Corpora: reads passages from JSON lines, and stores them in an index folder for access by row.

    corpus.jsonl[.gz] ──read_corpus──▶ Passage, Passage, … ──write_passages──▶ passages.jsonl + offsets.npy
                                                                                        │
                                                       row (an HNSW label) ──PassageTable[row]──▶ Passage

A row is the position of a passage in its corpus. The table maps the file into memory and parses a line at each access,
so a process holds 8 bytes per passage, independent of the length of the texts.
"""

from __future__ import annotations

import gzip
import mmap
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from protocol.errors import DataError
from protocol.types import Passage

PASSAGES_FILE = "passages.jsonl"
OFFSETS_FILE = "offsets.npy"


def read_corpus(path: Path) -> Iterator[Passage]:
    """Streams the passages of a `.jsonl` or `.jsonl.gz` file with the fields `id`, `text` and, optionally, `title`.

    Other fields and blank lines are ignored. An integer `id` becomes the string of its decimal digits.

    Raises: DataError that names the file, the line and the problem: not JSON, no `id` or `text`, an id used twice, or
    a file without a passage.
    """
    line_of_id: dict[str, int] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        passage = _parse(line, where=f"{path}, line {number}")
        first = line_of_id.setdefault(passage.id, number)
        if first != number:
            raise DataError(
                f"{path}, line {number}: id {passage.id!r} was already used in line {first}; ids must be unique"
            )
        yield passage
    if not line_of_id:
        raise DataError(f"{path} has no passage: give a file with one JSON object with `id` and `text` per line")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1."""
    number = 0
    try:
        with path.open("rb") as raw, cast(BinaryIO, gzip.open(raw)) if path.suffix == ".gz" else raw as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: not a complete gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read the corpus {path}: {error.strerror or error}") from None


def _parse(line: bytes, *, where: str) -> Passage:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    passage_id, title, text = record.get("id"), record.get("title"), record.get("text")
    if isinstance(passage_id, int) and not isinstance(passage_id, bool):
        passage_id = str(passage_id)
    if not isinstance(passage_id, str) or not passage_id:
        raise DataError(f"{where}: no `id`; give every passage a unique string `id`")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: passage {passage_id!r} has no `text`; add a text or remove the line")
    if title is not None and not isinstance(title, str):
        raise DataError(f"{where}: `title` of passage {passage_id!r} must be a string, got {type(title).__name__}")
    return Passage(id=passage_id, title=title or "", text=text)


def write_passages(passages: Iterable[Passage], folder: Path) -> int:
    """Writes `passages.jsonl` and `offsets.npy` (int64 [n + 1], byte positions of the lines); returns n."""
    offsets = [0]
    with (folder / PASSAGES_FILE).open("wb") as file:
        for passage in passages:
            record = {"id": passage.id, "title": passage.title, "text": passage.text}
            written = file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            offsets.append(offsets[-1] + written)
    np.save(folder / OFFSETS_FILE, np.asarray(offsets, dtype=np.int64))
    return len(offsets) - 1


class PassageTable:
    """The passages of an index folder by row, read from the file at each access."""

    def __init__(self, folder: Path) -> None:
        """Raises: DataError if one of the two files is missing or damaged, or they do not belong together."""
        try:
            self._offsets: NDArray[np.int64] = np.load(folder / OFFSETS_FILE, allow_pickle=False)
            with (folder / PASSAGES_FILE).open("rb") as file:
                self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the passages of index {folder}: {error}; build the index again") from None
        if self._offsets.ndim != 1 or int(self._offsets[-1]) != len(self._lines):
            raise DataError(f"{OFFSETS_FILE} and {PASSAGES_FILE} of index {folder} disagree; build the index again")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} passages")
        record = orjson.loads(self._lines[int(self._offsets[row]) : int(self._offsets[row + 1])])
        return Passage(id=record["id"], title=record["title"], text=record["text"])

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def close(self) -> None:
        self._lines.close()
