"""Question-answer JSONL: one object per line with `id`, `question` and `answers`; other fields are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, StringConstraints, ValidationError

from actor.tasks.task import Split, Task
from protocol.config_base import Options
from protocol.errors import ConfigError, DataError
from protocol.messages import MAX_ANSWER_CHARS, MAX_NAME_CHARS, MAX_QUESTION_CHARS
from protocol.types import Question

_Id = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_NAME_CHARS)]
_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_QUESTION_CHARS)]
_Answer = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_ANSWER_CHARS)]


class _Row(BaseModel):
    id: _Id
    question: _Text
    answers: list[_Answer] = Field(min_length=1)
    hops: int | None = None
    dataset: str | None = None


class QuestionAnsweringOptions(Options):
    """Options of the task qa."""

    questions: tuple[Path, ...] = Field(default=(), description="JSONL files of training questions.")
    eval_questions: tuple[Path, ...] = Field(default=(), description="JSONL files of evaluation questions.")


class QuestionAnswering(Task):
    """Questions from JSONL files: in training reshuffled for each epoch, in evaluation in file order."""

    Options = QuestionAnsweringOptions
    options: QuestionAnsweringOptions

    def __init__(self, options: QuestionAnsweringOptions, *, split: Split, seed: int) -> None:
        """Raises: ConfigError if no file is named; DataError if a file cannot be used or two questions have one id."""
        super().__init__(options, split=split, seed=seed)
        key = "questions" if split == "train" else "eval_questions"
        paths = options.questions if split == "train" else options.eval_questions
        if not paths:
            raise ConfigError(f"task.{key} must name at least one JSONL file, got none")
        self._questions = tuple(read_questions(paths))
        if not self._questions:
            raise DataError(f"task.{key} must hold at least one question, got none; check the files' content")
        seen: set[str] = set()
        for question in self._questions:
            if question.id in seen:
                raise DataError(f"question id {question.id!r} occurs twice; ids must be unique over all files")
            seen.add(question.id)
        self._order = (-1, np.arange(len(self._questions)))

    @property
    def num_questions(self) -> int:
        return len(self._questions)

    def question(self, cursor: int) -> Question:
        epoch, place = divmod(cursor, len(self._questions))
        if self.split == "train" and self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self._questions)))
        return self._questions[int(self._order[1][place])]


def read_questions(paths: Sequence[Path]) -> list[Question]:
    """Reads the files in order. `hops` and `dataset` become metadata if a row has them.

    Raises: DataError that names file, line and field of the first row that cannot be used.
    """
    questions: list[Question] = []
    for path in paths:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(
                f"cannot read questions from {path}: {error.strerror}; check the task's list of files"
            ) from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                questions.append(_parse(line, where=f"{path}:{number}"))
    return questions


def _parse(line: bytes, *, where: str) -> Question:
    try:
        row = _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        named = f"field {field!r}: " if field else ""
        raise DataError(
            f"{where}: {named}{first['msg']}; a row needs id, question and a non-empty list of answers"
        ) from None
    metadata = {name: str(value) for name, value in (("hops", row.hops), ("dataset", row.dataset)) if value is not None}
    return Question(id=row.id, text=row.question, answers=tuple(row.answers), metadata=metadata)
