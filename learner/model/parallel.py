"""The learner on several processes: ranks, collectives, and sharding of a module.

torchrun starts the processes; FSDP2 (`fully_shard`) keeps one part of every parameter, gradient and moment on each
rank. The denominators of a loss count tokens over all ranks, so gradients are summed over ranks, not averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.algorithms.diagnostics import Diagnostics
from protocol.errors import ConfigError

# Other ranks wait for rank 0's next batch, and rank 0 waits for actors. If a rank dies, torchrun ends the others.
_CONTROL_TIMEOUT = timedelta(days=7)
_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


@dataclass(frozen=True, slots=True)
class World:
    """This process's rank among the learner's `size` processes; the default is a single process.

    control  a gloo group for bytes and numbers on the CPU; None if size is 1
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor on `device`; shape and dtype must be equal on all ranks."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def reduce(self, diagnostics: Diagnostics) -> Diagnostics:
        """The diagnostics of all ranks together: sums are added, of maxima the largest is taken, in float64."""
        if self.size == 1:
            return diagnostics
        sums, maxima = diagnostics.to_tensors()
        dist.all_reduce(sums, group=self.control)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.control)
        return Diagnostics.from_tensors(sums, maxima)

    def all(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.control)
        return bool(found)

    def broadcast(self, data: bytes | None) -> bytes:
        """Returns rank 0's `data` on every rank; the others pass None. Waits for rank 0 for up to 7 days."""
        if self.size == 1:
            return data or b""
        num_bytes = torch.tensor(len(data or b""))
        dist.broadcast(num_bytes, src=0, group=self.control)
        if data:
            carrier = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            carrier = torch.empty(int(num_bytes), dtype=torch.uint8)
        if int(num_bytes):
            dist.broadcast(carrier, src=0, group=self.control)
        return carrier.numpy().tobytes()

    def barrier(self) -> None:
        """Waits until every rank has called it."""
        self.all(True)


@contextmanager
def join(device: str = "cpu", *, timeout_s: float = 600.0) -> Iterator[World]:
    """Yields the world of torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_*); without them, one process.

    device     cpu or cuda; with several processes, each takes the CUDA device of its local rank
    timeout_s  time limit of each collective within a step
    Raises: ConfigError if the device cannot be used.
    """
    size, rank, local_rank = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    place = torch.device("cuda", local_rank) if device == "cuda" and size > 1 else torch.device(device)
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"learner.device {str(place)!r} cannot be used: {reason}") from error
    try:
        if size == 1:
            yield World(device=place)
            return
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group(_backend(place), timeout=timedelta(seconds=timeout_s))
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT))
        yield World(rank=rank, size=size, local_rank=local_rank, device=place, control=control)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard(module: nn.Module, world: World, *, dtype: Literal["float32", "bfloat16"]) -> None:
    """Shards every decoder layer of `module`, then the rest of it, over all ranks, in place.

    dtype  bfloat16: forward and backward in bf16; parameters, gradient reduction and update in fp32, for any `world`.
           float32: with one rank the module is not changed
    Every rank must already have the same weights, because none are sent. Call it before the optimizer is built.
    Raises: ValueError if dtype is bfloat16 and a trained parameter is not float32.
    """
    mixed = dtype == "bfloat16"
    for name, parameter in module.named_parameters():
        if mixed and parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 to be trained in bfloat16, got {parameter.dtype}")
    if world.size == 1 and not mixed:
        return
    if not dist.is_initialized():
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(world.device), store=alone, rank=0, world_size=1)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for each in (*decoder_layers(module), module):
        fully_shard(each, mesh=mesh, mp_policy=policy if mixed else MixedPrecisionPolicy())
        assert isinstance(each, FSDPModule)
        each.set_gradient_divide_factor(1.0)
        each.set_force_sum_reduction_for_comms(True)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the backward pass recompute each decoder layer's activations instead of storing them.

    transformers does so only in training mode, which is set on the layers but not on their submodules: dropout stays
    off.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder_layers(model):
        layer.training = True


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The transformer layers of a Hugging Face model, or of a module that holds one."""
    return [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales gradients, sharded or not, to a global L2 norm of at most `max_norm`.

    Returns the norm before scaling, the same number on every rank.
    """
    trained = [each for each in parameters if each.grad is not None]
    norm = nn.utils.get_total_norm([each.grad for each in trained if each.grad is not None])
    norm = full(norm)
    nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor. If `tensor` is sharded, all ranks must call it (a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
