"""Ports that a role needs to connect must not be 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.config import Config, ModelConfig, NetworkConfig, RetrieverConfig
from protocol.config_file import require_ports
from protocol.errors import ConfigError


def config(*, control_port: int = 0, retriever_port: int = 0) -> Config:
    return Config(
        model=ModelConfig(path=Path("model")),
        network=NetworkConfig(control_port=control_port),
        retriever=RetrieverConfig(port=retriever_port),
    )


def test_a_required_port_that_is_0_is_refused_with_the_key() -> None:
    keys = ("network.control_port", "retriever.port")
    require_ports(config(control_port=1, retriever_port=2), *keys)
    with pytest.raises(ConfigError, match=r"^retriever\.port is 0: set it, or give the config\.json that"):
        require_ports(config(control_port=1), *keys)
    with pytest.raises(ConfigError, match=r"^network\.control_port and retriever\.port are 0: set them"):
        require_ports(config(), *keys)
