"""Question files, their errors, and the order of questions."""

import json
import os
from pathlib import Path

import pytest

from actor.rewards.reward import ExactMatchReward
from actor.tasks.build import evaluation_task, training_task
from actor.tasks.qa import QuestionAnswering, read_questions
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


def test_missing_files_doubled_ids_and_empty_tasks_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_questions([tmp_path / "absent.jsonl"])
    path = written(tmp_path / "q.jsonl", GOOD)
    with pytest.raises(DataError, match="'a' occurs twice"):
        QuestionAnswering(read_questions([path, path]), reward=ExactMatchReward(), seed=0)
    with pytest.raises(DataError, match="at least one question"):
        QuestionAnswering([], reward=ExactMatchReward(), seed=0)


def test_every_epoch_has_each_question_once_in_an_order_of_its_own():
    questions = [Question(id=str(k), text="?", answers=("x",)) for k in range(20)]
    task = QuestionAnswering(questions, reward=ExactMatchReward(), seed=1)
    epochs = [[task.question(cursor).id for cursor in range(20 * e, 20 * e + 20)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(q.id for q in questions)
    assert epochs[0] != epochs[1]
    assert [task.question(cursor).id for cursor in range(20)] == epochs[0]


def test_a_config_builds_its_tasks(tmp_path: Path):
    rows = [{**GOOD, "id": str(k)} for k in range(5)]
    path = written(tmp_path / "q.jsonl", *rows)
    config = TaskConfig(kind="qa", questions=(path,), eval_questions=(path,), reward="f1")
    assert training_task(config, seed=0).num_questions == 5
    assert [evaluation_task(config, seed=0).question(k).id for k in range(5)] == list("01234")
    with pytest.raises(ConfigError, match="eval_questions"):
        evaluation_task(TaskConfig(kind="qa", questions=(path,)), seed=0)
    toy = TaskConfig(kind="toy", worlds=(1, 2), eval_worlds=(3,))
    assert training_task(toy, seed=0).question(1).metadata["collection"] == "world-2"
    assert evaluation_task(toy, seed=0).question(1).metadata["collection"] == "world-3"
    with pytest.raises(ConfigError, match="eval_worlds"):
        evaluation_task(TaskConfig(kind="toy", worlds=(1,)), seed=0)


@pytest.mark.parametrize(("name", "count"), [("questions_train.jsonl", 700), ("questions_dev.jsonl", 2855)])
def test_the_real_question_files_can_be_read(name: str, count: int):
    path = DATA / "wiki_pool" / name
    if not path.exists():
        pytest.skip(f"no {path}; set PALIMPSEST_DATA to the data folder")
    assert len(read_questions([path])) == count
