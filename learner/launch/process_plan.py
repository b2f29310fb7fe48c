"""The processes that a config requires. Pure, except for the search for free ports."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from protocol.addresses import is_loopback, tcp_address
from protocol.config import Config
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of a run on this machine. `role`: learner, actor, engine, agent or retriever."""

    name: str
    role: str
    argv: tuple[str, ...]


def with_ports(config: Config) -> Config:
    """Replaces each port 0 by a free port, so that a restarted role has the same address.

    Raises: ConfigError.
    """
    num_engines = config.engine.count
    if config.engine.ports and len(config.engine.ports) != num_engines:
        raise ConfigError(f"engine.ports must have {num_engines} ports (engine.count), got {len(config.engine.ports)}")
    engine_ports = config.engine.ports or (0,) * num_engines
    network = config.network
    wanted = [network.control_port, network.weights_port, network.announce_port, config.retriever.port, *engine_ports]
    free = iter(_free_ports(network.host, wanted.count(0)))
    control, weights, announce, retriever, *engines = [port or next(free) for port in wanted]
    return config.model_copy(
        update={
            "network": network.model_copy(
                update={"control_port": control, "weights_port": weights, "announce_port": announce}
            ),
            "retriever": config.retriever.model_copy(update={"port": retriever}),
            "engine": config.engine.model_copy(update={"ports": tuple(engines)}),
        }
    )


def plan(config: Config, *, config_path: Path) -> list[ProcessSpec]:
    """Returns the processes of a config without a port 0, in the order in which to start them.

    Raises: ConfigError.
    """
    path = str(config_path)
    processes = [ProcessSpec("learner", "learner", _command("learner", path))]
    if config.retriever.indexes:
        processes.append(_retriever(config))
    for i, port in enumerate(config.engine.ports):
        argv = _command("engine", path, "--name", f"engine-{i}", "--host", config.network.host, "--port", str(port))
        processes.append(ProcessSpec(f"engine-{i}", "engine", argv))
    for i, url in enumerate(config.engine.urls):
        if not is_loopback(url) and config.network.api_key_file is None:
            raise ConfigError(f"engine.urls: {url} is beyond loopback and needs network.api_key_file")
        argv = _command("engine", path, "--name", f"sglang-{i}", "--attach", url)
        processes.append(ProcessSpec(f"sglang-{i}", "agent", argv))
    for i in range(config.actor.count):
        processes.append(ProcessSpec(f"actor-{i}", "actor", _command("actor", path, "--name", f"actor-{i}")))
    return processes


def extension_check(config_path: Path) -> ProcessSpec:
    """A process that imports workflow, task, reward and tools of the run, and ends with status 2 if one is wrong.

    The launcher imports no role, so it asks an actor before the other roles start.
    """
    return ProcessSpec("check", "step", _command("actor", str(config_path), "--check"))


def _retriever(config: Config) -> ProcessSpec:
    indexes = [f"{name}={folder}" for name, folder in config.retriever.indexes.items()]
    address = tcp_address(host=config.network.host, port=config.retriever.port)
    options = ["--address", address, "--threads", str(config.retriever.threads)]
    options += ["--max-batch", str(config.retriever.max_batch), "--dtype", config.retriever.dtype]
    if config.network.keys is not None:
        options += ["--keys", str(config.network.keys)]
    return ProcessSpec("retriever", "retriever", _command("retriever", *indexes, *options))


def _command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "learner.launch", *arguments)


def _free_ports(host: str, count: int) -> list[int]:
    """Returns `count` different ports that are free now; another process may take one before its role does.

    Raises: ConfigError (`host` is not an address of this machine).
    """
    sockets = []
    try:
        for _ in range(count):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sockets.append(socket.socket(family, socket.SOCK_STREAM))
            sockets[-1].bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
    except OSError as error:
        raise ConfigError(f"network.host {host!r} is not an address of this machine: {error.strerror}") from error
    finally:
        for each in sockets:
            each.close()
