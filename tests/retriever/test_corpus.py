from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import DataError
from protocol.types import Passage
from retriever.corpus import PassageTable, read_corpus, write_passages

GOOD = '{"id": "a", "title": "T", "text": "one", "src": 3}\n\n{"id": 7, "text": "two — ü"}\n'


def test_reads_titles_integer_ids_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    assert list(read_corpus(path)) == [Passage("a", "T", "one"), Passage("7", "", "two — ü")]


def test_reads_gzip(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode()))
    assert [passage.id for passage in read_corpus(path)] == ["a", "7"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "title": "T"}', r"line 2: passage 'b' has no `text`"),
        ('{"id": "b", "text": "  "}', r"line 2: passage 'b' has no `text`"),
        ('{"id": "b", "text": 3}', r"line 2: passage 'b' has no `text`"),
        ('{"text": "x"}', r"line 2: no `id`"),
        ('{"id": true, "text": "x"}', r"line 2: no `id`"),
        ('{"id": "a", "text": "x"}', r"line 2: id 'a' was already used in line 1"),
        ('{"id": "b", "title": 3, "text": "x"}', r"line 2: `title` of passage 'b' must be a string, got int"),
        ('{"id": "b", "text": ', r"line 2: not JSON"),
        ('["b"]', r"line 2: expected a JSON object, got list"),
    ],
)
def test_the_error_names_the_bad_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "a", "text": "one"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as error:
        list(read_corpus(path))
    assert str(path) in str(error.value)


def test_missing_empty_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the corpus .*none\.jsonl: No such file"):
        list(read_corpus(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no passage"):
        list(read_corpus(tmp_path / "empty.jsonl"))
    whole = gzip.compress(GOOD.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="not a complete gzip file"):
        list(read_corpus(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    with pytest.raises(DataError, match="not a complete gzip file"):
        list(read_corpus(tmp_path / "plain.jsonl.gz"))


_TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@given(texts=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=8))
def test_the_table_returns_the_written_passages(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("table")
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(texts)]
    assert write_passages(passages, folder) == len(passages)
    table = PassageTable(folder)
    assert [table[row] for row in reversed(range(len(table)))] == passages[::-1]
    with pytest.raises(IndexError):
        table[len(table)]
    table.close()


def test_offsets_that_do_not_fit_the_passages_are_refused(tmp_path: Path) -> None:
    write_passages([Passage("a", "", "x")], tmp_path)
    with (tmp_path / "passages.jsonl").open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match="disagree"):
        PassageTable(tmp_path)
