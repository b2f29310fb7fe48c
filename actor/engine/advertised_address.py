"""Checks that actors on other nodes can reach the URL that an engine advertises."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from protocol.addresses import is_loopback_host
from protocol.errors import ConfigError


def check_advertised(url: str, *, network_host: str) -> None:
    """Refuses a loopback or wildcard `url` if the run spans nodes (`network_host` is not loopback).

    Raises: ConfigError.
    """
    host = urlsplit(url).hostname or ""
    if is_loopback_host(network_host) or not (is_loopback_host(host) or _is_wildcard(host)):
        return
    raise ConfigError(
        f"actors on other nodes (network.host is {network_host}) cannot reach an engine at {url}: "
        "give the address of this node with --advertise URL"
    )


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
