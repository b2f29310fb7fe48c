"""What the launcher can check before a start without importing torch: files, folders, disk, ports, keys, settings."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from learner.launch.model_files import ModelFiles, read_model_files
from learner.launch.pointless_settings import pointless_settings
from learner.store.folder_lock import read_holder
from learner.store.resume_key import changes
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.addresses import is_loopback
from protocol.check_result import CheckResult, attempt
from protocol.config import Config
from protocol.errors import ConfigError, DataError, SecurityError, UserError
from protocol.keys import Keys
from protocol.run_identity import learner_identity

# AdamW: masters and two moments in float32.
_CHECKPOINT_BYTES_PER_WEIGHT = 12
_SERVER_TIMEOUT_S = 2.0


def preflight(config: Config) -> Iterator[CheckResult]:
    """Yields one result for each check. `config` may have ports 0: the launcher chooses free ones."""
    yield from _model(config)
    yield attempt("run.dir", lambda: _writable(config.run.dir))
    yield from _run_state(config)
    yield from _ports(config)
    yield attempt("network", lambda: check_network(config))
    yield from _engine_servers(config)
    for key, message in pointless_settings(config):
        yield CheckResult("warn", key, message)


def check_folders(config: Config) -> None:
    """Raises: DataError if the model folder or an index folder does not exist."""
    for name, path in [
        ("model.path", config.model.path),
        *((f"retriever.indexes.{name}", path) for name, path in config.retriever.indexes.items()),
    ]:
        if not path.is_dir():
            raise DataError(f"{name}: folder {path} does not exist")
    if not (config.model.path / "tokenizer.json").is_file():
        raise DataError(f"model.path: {config.model.path} has no tokenizer.json; save the model's fast tokenizer there")


def check_network(config: Config) -> str:
    """Returns what was found. Raises: SecurityError, DataError."""
    network = config.network
    local = is_loopback(network.control_address)
    if not local and network.keys is None:
        raise SecurityError(
            f"network.host {network.host} is beyond loopback and needs CURVE keys: run `palimpsest keys DIR` "
            "and set network.keys to DIR"
        )
    if not local and config.engine.count and network.api_key_file is None:
        raise SecurityError(
            f"network.host {network.host} is beyond loopback, so engines need a bearer token: write a long "
            "random string to a file and set network.api_key_file to its path"
        )
    if network.keys is not None:
        Keys(network.keys).pair("server")
    network.api_key()
    return f"host {network.host}" + (", keys and token can be read" if network.keys else "")


def _model(config: Config) -> Iterator[CheckResult]:
    try:
        model = read_model_files(config.model.path, key="model.path")
    except UserError as error:
        yield CheckResult("fail", "model.path", str(error).removeprefix("model.path: "))
    else:
        yield CheckResult("ok", "model.path", str(model))
        if config.learner.lora is not None:
            targets = config.learner.lora.targets
            yield attempt("learner.lora", lambda: _lora(model, targets))
        yield _disk(config, model)
    if config.learner.reference is not None:
        folder = config.learner.reference
        yield attempt("learner.reference", lambda: str(read_model_files(folder, key="learner.reference")))


def _lora(model: ModelFiles, targets: tuple[str, ...]) -> str:
    if missing := [each for each in targets if not any(f".{each}.weight" in name for name in model.tensors)]:
        raise ConfigError(
            f"learner.lora.targets: no weight of the model is named {', '.join(missing)}; its layers have names like "
            f"{next(iter(sorted(model.tensors)), 'none')}"
        )
    return f"{len(targets)} kinds of layers get an adapter"


def _disk(config: Config, model: ModelFiles) -> CheckResult:
    folder = _existing(config.run.dir)
    free = shutil.disk_usage(folder).free
    per_weight = 0 if config.learner.lora is not None else _CHECKPOINT_BYTES_PER_WEIGHT
    checkpoint = model.num_bytes + per_weight * model.num_weights
    wanted = (config.learner.checkpoint.keep + 1) * checkpoint
    found = f"{free / 1e9:.1f} GB free, a checkpoint takes about {checkpoint / 1e9:.1f} GB"
    if free < checkpoint:
        return CheckResult("fail", "disk", f"{found}: free space in {folder}, or choose another run.dir")
    if free < wanted:
        return CheckResult(
            "warn",
            "disk",
            f"{found}, and learner.checkpoint.keep = {config.learner.checkpoint.keep} and one that is being written "
            f"need {wanted / 1e9:.1f} GB: free space in {folder}",
        )
    return CheckResult("ok", "disk", found)


def _writable(folder: Path) -> str:
    """Checks that files can be written to `folder`, or to the folder that it will be made in."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise DataError(f"{existing} is not a folder; choose another run.dir")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise DataError(f"run.dir {folder} cannot be written: {error.strerror}; choose another run.dir") from error
    return f"{folder} can be written" if folder.exists() else f"{folder} will be made"


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _run_state(config: Config) -> Iterator[CheckResult]:
    """Whether the folder holds a run, and whether this config may resume it. Weights are not compared."""
    folder = RunFolder(config.run.dir)
    if not folder.store.is_file():
        return
    try:
        with closing(Store(folder.store, read_only=True)) as store:
            num_steps, problems = store.num_batches(), changes(store.meta(), learner_identity(config, weights=False))
    except UserError as error:
        yield CheckResult("fail", "resume", str(error))
        return
    if problems:
        yield CheckResult(
            "fail",
            "resume",
            f"{folder.root} contains another run: {'; '.join(problems)}; to resume, undo the change; to start a new "
            "run, choose another run.dir",
        )
    else:
        yield CheckResult("ok", "resume", f"{folder.root} contains this run; it resumes after {num_steps} steps")


def _ports(config: Config) -> Iterator[CheckResult]:
    network = config.network
    ports = {
        "network.control_port": network.control_port,
        "network.weights_port": network.weights_port,
        "network.announce_port": network.announce_port,
        **{f"engine.ports[{i}]": port for i, port in enumerate(config.engine.ports)},
    }
    if config.retriever.indexes:
        ports["retriever.port"] = config.retriever.port
    used = {key: port for key, port in ports.items() if port}
    for port, count in Counter(used.values()).items():
        if count > 1:
            keys = [key for key, each in used.items() if each == port]
            yield CheckResult("fail", "ports", f"{', '.join(keys)} are all {port}: give each another port, or 0")
    if (holder := _launcher(config)) is not None:
        yield CheckResult("warn", "ports", f"not checked: a launcher runs in {config.run.dir} ({holder})")
        return
    problems = [problem for key, port in used.items() if (problem := _port_problem(network.host, key, port))]
    for problem in problems:
        yield CheckResult("fail", "ports", problem)
    if (problem := _port_problem(network.host, "network.host", 0)) and not problems:
        yield CheckResult("fail", "network.host", f"{network.host!r} is not an address of this machine: {problem}")
    elif not problems:
        chosen = len(ports) - len(used)
        yield CheckResult("ok", "ports", f"{len(used)} are free, {chosen} are chosen at the start")


def _launcher(config: Config) -> str | None:
    path = RunFolder(config.run.dir).launcher_lock
    holder = read_holder(path) if path.is_file() else None
    if holder is None:
        return None
    with suppress(OSError):
        os.kill(holder.pid, 0)
        return str(holder)
    return None


def _port_problem(host: str, key: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"{key} {port}: {os.strerror(error.errno or 0)}; choose another port, or 0" if port else str(error)
    return ""


def _engine_servers(config: Config) -> Iterator[CheckResult]:
    for url in config.engine.urls:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_SERVER_TIMEOUT_S):
                pass
        except urllib.error.HTTPError:
            pass  # it responds
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            yield CheckResult("warn", "engine.urls", f"{url} does not respond ({reason}): start it before the run")
            continue
        yield CheckResult("ok", "engine.urls", f"{url} responds")
