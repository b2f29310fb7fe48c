"""The processes and ports that a config results in."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.launch.process_plan import plan, with_ports
from protocol.config import Config
from protocol.config_file import parse_config
from protocol.errors import ConfigError


def config(**sections: object) -> Config:
    tree: dict[str, object] = {"model": {"path": "/m"}, "task": {"kind": "toy", "worlds": [1]}, **sections}
    return parse_config(tree, source="test")


def test_ports_that_are_0_become_free_ports_once() -> None:
    indexes = {"indexes": {"a": "/i/a"}}
    found = with_ports(config(engine={"count": 3}, network={"control_port": 7001}, retriever=indexes))
    network = found.network
    named = [network.weights_port, network.announce_port, found.retriever.port, *found.engine.ports]
    assert network.control_port == 7001
    assert len(set(named)) == 6
    assert all(port > 1023 for port in named)
    assert with_ports(found) == found


@pytest.mark.parametrize("port", [0, 7310])
def test_without_indexes_no_port_is_chosen_for_a_retriever(port: int) -> None:
    """An actor or an evaluation with a port would wait for a retriever that no process starts."""
    assert with_ports(config(retriever={"port": port})).retriever.port == port


def test_the_plan_contains_every_process() -> None:
    wanted = config(
        engine={"count": 2, "urls": ["http://127.0.0.1:30000"]},
        actor={"count": 2},
        retriever={"indexes": {"a": "/i/a", "b": "/i/b"}},
        network={"keys": "/k"},
    )
    specs = plan(with_ports(wanted), config_path=Path("/r/config.json"))
    assert [(spec.name, spec.role) for spec in specs] == [
        ("learner", "learner"),
        ("retriever", "retriever"),
        ("engine-0", "engine"),
        ("engine-1", "engine"),
        ("sglang-0", "agent"),
        ("actor-0", "actor"),
        ("actor-1", "actor"),
    ]
    by_name = {spec.name: " ".join(spec.argv[1:]) for spec in specs}
    assert by_name["learner"] == "-m learner.launch learner /r/config.json"
    assert "retriever a=/i/a b=/i/b --address tcp://127.0.0.1:" in by_name["retriever"]
    assert by_name["retriever"].endswith("--keys /k")
    assert by_name["sglang-0"].endswith("--attach http://127.0.0.1:30000")
    assert len({argv.rpartition("--port ")[2] for name, argv in by_name.items() if name.startswith("engine")}) == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"count": 2, "ports": [1]}}, r"engine.ports must have 2 ports \(engine.count\), got 1"),
        ({"network": {"host": "203.0.113.7"}}, r"network.host '203.0.113.7' is not an address of this machine"),
        ({"engine": {"urls": ["http://203.0.113.7:1"]}}, r"is beyond loopback and needs network.api_key_file"),
    ],
)
def test_a_config_without_a_valid_plan_is_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(with_ports(config(**sections)), config_path=Path("c"))
