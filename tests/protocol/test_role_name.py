"""Names of actor and engine processes."""

from __future__ import annotations

import pytest

from protocol.errors import ConfigError
from protocol.role_name import default_name, role_name


def test_the_default_name_has_the_role_the_host_and_the_process_id() -> None:
    assert default_name("actor", host="node-3.example", pid=77) == "actor-node-3.example-77"
    assert default_name("engine", host="Zürich rack/3", pid=1) == "engine-Z-rich-rack-3-1"
    long = default_name("engine", host="h" * 200, pid=4_194_304)
    assert (len(long), long.endswith("-4194304")) == (64, True)
    assert role_name("actor", None) == role_name("actor", None) != role_name("engine", None)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "n" * 65])
def test_a_name_that_cannot_be_a_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name must be 1 to 64"):
        role_name("engine", name)
