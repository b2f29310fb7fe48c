"""Question files, their errors, and the order of questions."""

import json
import os
from pathlib import Path

import pytest

from actor.extensions import TASKS
from actor.tasks.qa import QuestionAnswering, QuestionAnsweringOptions, read_questions
from actor.tasks.task import Split, Task
from protocol.config import TaskConfig
from protocol.errors import ConfigError, DataError
from protocol.types import Question

DATA = Path(os.environ.get("PALIMPSEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
GOOD = {"id": "a", "question": "who?", "answers": ["x", "y"], "hops": 2, "gold_ids": ["p"]}


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return path


def test_rows_become_questions(tmp_path: Path):
    (question,) = read_questions([written(tmp_path / "q.jsonl", GOOD)])
    assert question == Question(id="a", text="who?", answers=("x", "y"), metadata={"hops": "2"})


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**GOOD, "answers": []}, "answers"),
        ({**GOOD, "answers": ["x", " "]}, "answers.1"),
        ({**GOOD, "question": "  "}, "question"),
        ({"id": "b", "question": "who?"}, "answers"),
        ("{not json", "JSON"),
        ("[1]", "object"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, row: object, named: str):
    path = written(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{named}"):
        read_questions([path])


def make_task(split: Split = "train", seed: int = 0, **section: object) -> Task:
    """The task of a `[task]` section."""
    return TASKS.create(TaskConfig.model_validate(section), base_dir=None, split=split, seed=seed)


def test_missing_files_repeated_ids_and_empty_tasks_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_questions([tmp_path / "absent.jsonl"])
    path = written(tmp_path / "q.jsonl", GOOD)
    with pytest.raises(DataError, match="'a' occurs twice"):
        make_task(questions=[path, path])
    with pytest.raises(DataError, match=r"task\.questions must hold at least one question"):
        make_task(questions=[written(tmp_path / "empty.jsonl")])


def test_every_epoch_has_each_question_once_in_its_own_order(tmp_path: Path):
    path = written(tmp_path / "q.jsonl", *({**GOOD, "id": str(k)} for k in range(20)))
    task = QuestionAnswering(QuestionAnsweringOptions(questions=(path,)), split="train", seed=1)
    epochs = [[task.question(cursor).id for cursor in range(20 * e, 20 * e + 20)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(str(k) for k in range(20))
    assert epochs[0] != epochs[1]
    assert [task.question(cursor).id for cursor in range(20)] == epochs[0]


def test_the_order_depends_on_the_seed_and_not_on_earlier_calls(tmp_path: Path):
    path = written(tmp_path / "q.jsonl", *({**GOOD, "id": str(k)} for k in range(20)))

    def order(seed: int, cursors: range) -> list[str]:
        task = make_task(seed=seed, questions=[path])
        return [task.question(cursor).id for cursor in cursors]

    assert order(1, range(60)) == order(1, range(59, -1, -1))[::-1]
    assert order(1, range(60)) != order(2, range(60))


def test_a_section_makes_the_task_of_each_split(tmp_path: Path):
    rows = [{**GOOD, "id": str(k)} for k in range(5)]
    path = written(tmp_path / "q.jsonl", *rows)
    assert make_task(use="qa", questions=[path], eval_questions=[path]).num_questions == 5
    evaluation = make_task("eval", use="qa", questions=[path], eval_questions=[path])
    assert [evaluation.question(k).id for k in range(5)] == list("01234")
    with pytest.raises(ConfigError, match=r"task\.eval_questions must name at least one JSONL file"):
        make_task("eval", use="qa", questions=[path])
    with pytest.raises(ConfigError, match=r"task\.questions must name at least one JSONL file"):
        make_task("train", use="qa", eval_questions=[path])
    toy = {"use": "toy", "worlds": [1, 2], "eval_worlds": [3]}
    assert make_task("train", **toy).question(1).metadata["collection"] == "world-2"
    assert make_task("eval", **toy).question(1).metadata["collection"] == "world-3"
    with pytest.raises(ConfigError, match=r"task\.eval_worlds must name at least one seed"):
        make_task("eval", use="toy", worlds=[1])


def test_the_default_task_is_qa():
    assert TASKS.load(TaskConfig().use) is QuestionAnswering


def test_relative_question_files_are_taken_from_base_dir(tmp_path: Path):
    written(tmp_path / "q.jsonl", GOOD)
    section = TaskConfig.model_validate({"questions": ["q.jsonl"]})
    task = TASKS.create(section, base_dir=tmp_path, split="train", seed=0)
    assert task.question(0).id == "a"


@pytest.mark.parametrize("name", ["questions_train.jsonl", "questions_dev.jsonl"])
def test_the_real_question_files_can_be_read(name: str):
    path = DATA / "wiki_pool" / name
    if not path.exists():
        pytest.skip(f"no {path}; set PALIMPSEST_DATA to the data folder")
    num_rows = sum(bool(line.strip()) for line in path.read_bytes().splitlines())
    assert len(read_questions([path])) == num_rows > 0
