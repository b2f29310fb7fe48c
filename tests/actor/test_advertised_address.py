"""The URL that an engine advertises, and the seed that it starts with."""

from __future__ import annotations

import pytest

from actor.engine.advertised_address import check_advertised
from actor.engine_command import random_engine_seed
from protocol.errors import ConfigError


@pytest.mark.parametrize("url", ["http://127.0.0.1:3", "http://localhost:3", "http://0.0.0.0:3", "http://[::]:3"])
def test_loopback_and_wildcard_urls_are_refused_if_the_run_spans_nodes(url: str) -> None:
    check_advertised(url, network_host="127.0.0.1")
    check_advertised("http://10.0.0.2:3", network_host="10.0.0.1")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1\) cannot reach an engine at .*--advertise URL"):
        check_advertised(url, network_host="10.0.0.1")


def test_engine_seeds_differ_between_engines_and_between_restarts() -> None:
    seeds = {random_engine_seed(0, f"engine-{i % 4}") for i in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
