"""Prefixes that the index finds are in the rows that it names, whatever was saved before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actor.engine.prefix_index import PrefixIndex, block_hashes, shared_length

FIRST_ROW, NUM_ROWS = 10, 3
sequences = st.lists(st.integers(0, 1), max_size=40)


@given(st.lists(st.tuples(st.booleans(), sequences), max_size=40))
def test_a_found_prefix_is_in_its_row(script: list[tuple[bool, list[int]]]) -> None:
    index = PrefixIndex(first_row=FIRST_ROW, num_rows=NUM_ROWS)
    rows: dict[int, list[int]] = {}
    for saves, tokens in script:
        if saves and (row := index.save(tokens)) is not None:
            assert FIRST_ROW <= row < FIRST_ROW + NUM_ROWS
            rows[row] = tokens
        found = index.find(tokens, block_hashes(tokens))
        if saves and len(tokens) >= 8:
            assert found is not None
            assert found.length == len(tokens)
        if found is not None:
            assert rows[found.row][: found.length] == tokens[: found.length]


def test_the_least_recently_used_row_is_overwritten() -> None:
    index = PrefixIndex(first_row=0, num_rows=2)
    old, used, new = ([token] * 8 for token in range(3))
    rows = {index.save(old), index.save(used)}
    assert rows == {0, 1}
    index.find(old, block_hashes(old))
    index.save(new)
    assert index.find(old, block_hashes(old)) is not None
    assert index.find(used, block_hashes(used)) is None
    index.clear()
    assert index.find(old, block_hashes(old)) is None
    assert index.save(used) in rows


def test_a_longer_sequence_replaces_its_own_prefix() -> None:
    index = PrefixIndex(first_row=0, num_rows=2)
    row = index.save([1] * 9)
    assert index.save([1] * 20) == row
    assert index.save([1] * 12) is None, "it is saved already"
    assert index.save([1] * 15 + [2] * 5) != row, "both continuations are kept"


def test_without_rows_nothing_is_saved() -> None:
    index = PrefixIndex(first_row=0, num_rows=0)
    assert index.save([1] * 20) is None
    assert index.find([1] * 20, block_hashes([1] * 20)) is None


def test_shared_length_counts_whole_blocks() -> None:
    tokens = list(range(30))
    assert shared_length(block_hashes(tokens), set(block_hashes(tokens[:19]))) == 16
    assert shared_length(block_hashes(tokens), set(block_hashes([0, 2] * 10))) == 0
