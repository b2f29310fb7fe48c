"""One launcher and one learner per folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.store.folder_lock import is_locked, locked
from protocol.errors import DataError


def test_a_second_holder_is_refused_until_the_first_leaves(tmp_path: Path) -> None:
    path = tmp_path / "run" / "learner.lock"
    assert not is_locked(path)
    with locked(path, what="a learner"):
        assert is_locked(path)
        with pytest.raises(DataError, match="a learner is already running in"), locked(path, what="a learner"):
            pass
    assert not is_locked(path)
    with locked(path, what="a learner"):
        pass


def test_a_folder_that_cannot_be_made_raises_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"run\.dir .* cannot be written"),
        locked(tmp_path / "file" / "x", what="a learner"),
    ):
        pass
