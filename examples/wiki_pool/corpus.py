"""Reads the passages and questions of --data; writes a subset of them for a short run."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from actor.chat.chatml import plain
from protocol.atomic_write import atomic_path
from protocol.errors import DataError

CORPUS = "corpus.jsonl.gz"
VECTORS = "minilm_passages_fp16.npz"
TRAIN, DEV = "questions_train.jsonl", "questions_dev.jsonl"

_Row = TypeVar("_Row")


def corpus_in(folder: Path) -> Path:
    packed = folder / CORPUS
    return packed if packed.is_file() else folder / "corpus.jsonl"


def read_passages(corpus: Path) -> list[str]:
    """The passages as `title: text`, the form in an observation. Raises: DataError."""
    try:
        return [plain(f"{row.get('title', '')}: {row['text']}") for row in _read_rows(corpus)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the corpus {corpus}: {error!r}; README.md names the sources") from error


def copy_questions(data: Path, out: Path) -> None:
    """Raises: DataError if a file is missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (TRAIN, DEV):
        shutil.copyfile(_question_file(data, name), out / name)


def write_subset(data: Path, out: Path, *, num_train: int, num_dev: int, num_passages: int) -> None:
    """Writes evenly spaced questions, the passages that answer them, and evenly spaced other passages up to
    `num_passages`; also their vectors, if `data` has them.

    Raises: DataError if a file is missing or cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        rows = list(_read_rows(corpus_in(data)))
        chosen = {
            name: spaced(list(_read_rows(_question_file(data, name))), num)
            for name, num in ((TRAIN, num_train), (DEV, num_dev))
        }
        titles = {title for questions in chosen.values() for each in questions for title in each["gold_titles"]}
        others = [row for row in rows if row.get("title") not in titles]
        num_gold = len(rows) - len(others)
        kept = {row["id"] for row in spaced(others, max(0, num_passages - num_gold))}
        rows = [row for row in rows if row["id"] in kept or row.get("title") in titles]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read --data {data}: {error!r}; README.md names the files and fields") from error
    with atomic_path(out / CORPUS) as path, gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    _write_vectors(data / VECTORS, out / VECTORS, ids=[row["id"] for row in rows])
    for name, questions in chosen.items():
        (out / name).write_text("".join(json.dumps(each) + "\n" for each in questions), encoding="utf-8")


def spaced(items: Sequence[_Row], num: int) -> list[_Row]:
    """`num` items at even distances, all if there are fewer."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


def _write_vectors(source: Path, target: Path, *, ids: Sequence[str]) -> None:
    if not source.is_file():
        return
    with np.load(source) as file:
        row_of = {str(each): row for row, each in enumerate(file["ids"])}
        if all(each in row_of for each in ids):
            np.savez(target, ids=np.array(ids), vectors=file["vectors"][[row_of[each] for each in ids]])


def _question_file(data: Path, name: str) -> Path:
    if not (data / name).is_file():
        raise DataError(f"--data {data} has no {name}; README.md names the sources of the questions")
    return data / name


def _read_rows(path: Path) -> Iterator[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())
