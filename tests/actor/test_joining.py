"""Names, addresses and seeds of roles that join a run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from actor.engine.joining import check_advertised, default_name, fresh_seed, role_name
from protocol.config import Config, ModelConfig, NetworkConfig, RetrieverConfig, TaskConfig
from protocol.config_file import require_ports
from protocol.errors import ConfigError


def config(*, control_port: int = 0, retriever_port: int = 0) -> Config:
    return Config(
        model=ModelConfig(path=Path("model")),
        task=TaskConfig(kind="toy", worlds=(1,)),
        network=NetworkConfig(control_port=control_port),
        retriever=RetrieverConfig(port=retriever_port),
    )


def test_a_default_name_is_the_process_own() -> None:
    assert default_name("actor", host="node-3.example", pid=77) == "actor-node-3.example-77"
    assert default_name("engine", host="Zürich rack/3", pid=1) == "engine-Z-rich-rack-3-1"
    long = default_name("engine", host="h" * 200, pid=4_194_304)
    assert (len(long), long.endswith("-4194304")) == (64, True)
    assert role_name("actor", None) == role_name("actor", None) != role_name("engine", None)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "n" * 65])
def test_a_name_must_do_as_a_folders(name: str) -> None:
    with pytest.raises(ConfigError, match="--name must be 1 to 64"):
        role_name("engine", name)


def test_ports_must_be_known() -> None:
    keys = ("network.control_port", "retriever.port")
    require_ports(config(control_port=1, retriever_port=2), *keys)
    with pytest.raises(ConfigError, match=r"^retriever\.port is 0: set it, or give the config\.json that"):
        require_ports(config(control_port=1), *keys)
    with pytest.raises(ConfigError, match=r"^network\.control_port and retriever\.port are 0: set them"):
        require_ports(config(), *keys)


@pytest.mark.parametrize("url", ["http://127.0.0.1:3", "http://localhost:3", "http://0.0.0.0:3", "http://[::]:3"])
def test_actors_must_be_able_to_reach_the_engine(url: str) -> None:
    check_advertised(url, network_host="127.0.0.1")
    check_advertised("http://10.0.0.2:3", network_host="10.0.0.1")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1\) cannot reach an engine at .*--advertise URL"):
        check_advertised(url, network_host="10.0.0.1")


def test_no_two_engines_draw_the_same_seeds() -> None:
    """Nor one before and after a restart."""
    seeds = {fresh_seed(0, f"engine-{i % 4}") for i in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
