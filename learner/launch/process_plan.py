"""Plans the processes of a run from its config. Pure, except for the search for free ports."""

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
    """One process of a run on this machine.

    role: learner, actor, engine, retriever, agent (weight agent of an SGLang server), or step (runs once)
    """

    name: str
    role: str
    argv: tuple[str, ...]


def with_ports(config: Config) -> Config:
    """Replaces each port 0 by a free port, so that a restarted role has the same address.

    Without indexes there is no retriever to start: its port is kept.

    Raises: ConfigError.
    """
    num_engines = config.engine.count
    if config.engine.ports and len(config.engine.ports) != num_engines:
        raise ConfigError(f"engine.ports must have {num_engines} ports (engine.count), got {len(config.engine.ports)}")
    engine_ports = config.engine.ports or (0,) * num_engines
    network = config.network
    retriever_ports = (config.retriever.port,) if config.retriever.indexes else ()
    wanted = [network.control_port, network.weights_port, network.announce_port, *engine_ports, *retriever_ports]
    free = iter(_free_ports(network.host, wanted.count(0)))
    control, weights, announce, *others = [port or next(free) for port in wanted]
    engines, (retriever,) = others[:num_engines], others[num_engines:] or (config.retriever.port,)
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


def evaluation_services(config: Config, *, config_path: Path, weight_version: str | None) -> list[ProcessSpec]:
    """The servers of an evaluation: the retriever if there are indexes, and an engine unless `weight_version` is None.

    The engine serves model.path as `weight_version` at the first of engine.ports.
    """
    processes = [_retriever(config)] if config.retriever.indexes else []
    if weight_version is not None:
        options = ("--name", "engine", "--port", str(config.engine.ports[0]), "--frozen", weight_version)
        processes.append(ProcessSpec("engine", "engine", _command("engine", str(config_path), *options)))
    return processes


def evaluator(folder: Path, *, name: str = "evaluator") -> ProcessSpec:
    """The process that takes the samples of the evaluation in `folder` and ends."""
    return ProcessSpec(name, "step", _command("evaluator", str(folder)))


def extension_checks(config: Config, *, config_path: Path) -> list[ProcessSpec]:
    """Processes to run before the roles: each imports extensions of the run and ends with status 2 if one is wrong.

    An actor checks workflow, task, reward and tools, unless actors run elsewhere. The learner checks imported
    algorithms; options of built-in ones are checked when the config is read.
    """
    learner = config.learner
    algorithms = (learner.advantage, learner.loss, *learner.loss.corrections)
    roles = ["actor"] if config.actor.count else []
    roles += ["learner"] if any(":" in section.use for section in algorithms) else []
    return [ProcessSpec(f"check-{role}", "step", _command(role, str(config_path), "--check")) for role in roles]


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
    """Returns `count` different ports that are free now. Another process may take one before the role listens on it.

    Raises: ConfigError if `host` is not an address of this machine.
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
