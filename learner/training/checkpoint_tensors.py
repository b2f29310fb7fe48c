"""Saves and loads the tensors of a checkpoint's training/ folder with torch.distributed.checkpoint (DCP), sharded.

One flat table: `model/NAME` trained weights; `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME` AdamW's state;
`rng/RANK/cpu`, `rng/RANK/cuda` RNG states. The learning-rate schedule has no state: it is a pure function of the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from learner.model.parallel import World
from protocol.errors import DataError


def save_training_tensors(
    folder: Path, *, model: nn.Module, value_head: nn.Module | None, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Writes one safetensors file per rank into `folder`. All ranks must call it. Raises: OSError."""
    table = _rng(world)
    for name, parameter in _trained(model, value_head).items():
        table[f"model/{name}"] = parameter.detach()
        for kind, value in optimizer.state.get(parameter, {}).items():
            table[f"{kind}/{name}"] = value
    with _checkpointing():
        save(
            table,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=world.control,
            no_dist=world.size == 1,
        )


def load_training_tensors(
    folder: Path, *, model: nn.Module, value_head: nn.Module | None, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Loads the tensors that `save_training_tensors` wrote on any number of ranks into model, optimizer and RNGs.

    Raises: DataError if they cannot be read or belong to another model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        stored = {
            name: entry.size
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"checkpoint {folder} cannot be read: {error}") from error
    trained = _trained(model, value_head)
    for name, parameter in trained.items():
        if (found := stored.get(f"model/{name}")) != parameter.shape:
            got = "nothing" if found is None else tuple(found)
            raise DataError(f"checkpoint {folder}: {name} must have shape {tuple(parameter.shape)}, got {got}")
    moments = {
        name: {kind: value for kind, value in _empty_moments(parameter).items() if f"{kind}/{name}" in stored}
        for name, parameter in trained.items()
    }
    rng = {name: tensor for name, tensor in _rng(world).items() if name in stored}
    table = {f"model/{name}": parameter.detach() for name, parameter in trained.items()} | rng
    table |= {f"{kind}/{name}": value for name, held in moments.items() for kind, value in held.items()}
    try:
        with _checkpointing():
            load(table, storage_reader=reader, process_group=world.control, no_dist=world.size == 1)
    except OSError as error:
        raise DataError(f"checkpoint {folder} cannot be read: {error}") from error
    for name, held in moments.items():
        if held:
            optimizer.state[trained[name]] = held
    _set_rng(rng, world)


def _trained(model: nn.Module, value_head: nn.Module | None) -> dict[str, nn.Parameter]:
    """The trained parameters by name, tied ones once. `state_dict` makes FSDP reshard them first."""
    named = model.state_dict(keep_vars=True)
    if value_head is not None:
        named |= {f"value_head.{name}": tensor for name, tensor in value_head.state_dict(keep_vars=True).items()}
    seen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, tensor in named.items():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            seen.setdefault(id(tensor), (name, tensor))
    return dict(seen.values())


def _empty_moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    moment = torch.zeros_like(parameter.detach())
    return {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": moment.clone()}


def _rng(world: World) -> dict[str, Tensor]:
    states = {f"rng/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"rng/{world.rank}/cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _set_rng(states: dict[str, Tensor], world: World) -> None:
    for name, state in states.items():
        if name.endswith("cuda"):
            torch.cuda.set_rng_state(state, world.device)
        else:
            torch.set_rng_state(state)


@contextmanager
def _checkpointing() -> Iterator[None]:
    """Hides DCP's warning about saving from a single process, and raises the first rank's error as OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"rank {rank}: {cause}") from cause
