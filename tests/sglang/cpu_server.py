"""SGLang's own server on a machine without a GPU: `python cpu_server.py --model-path DIR --device cpu ...`.

SGLang computes a small model with PyTorch alone where it is told to, but three things at its import ask for CUDA. What
they need is given here, before it; SGLang itself is as released. The processes that it spawns import this module again
and so find the same; with a GPU nothing of it is needed, and nothing is changed.
"""

from __future__ import annotations

import importlib.machinery
import runpy
import sys
import types
from collections.abc import Callable

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _row_length: int,
) -> None:
    """Writes request i's slice of `out_cache_loc` [sum of lengths] to its row of `req_to_token`, [start, end)."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def _absent(name: str) -> Callable[..., object]:
    def kernel(*_: object, **__: object) -> object:
        raise NotImplementedError(f"sgl_kernel.{name}: not needed by a small dense model, so not written here")

    return kernel


class _Kernels(types.ModuleType):
    """`sgl_kernel`, whose wheels hold CUDA only: the one kernel that is called; others for a CPU can be imported."""

    def __init__(self) -> None:
        super().__init__("sgl_kernel")
        self.__version__ = "0"
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None, is_package=True)
        self.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.endswith("_cpu"):
            return _absent(name)
        raise AttributeError(name)  # SGLang does without, as where the import fails


def _prepare() -> None:
    for name in ("nms", "qnms"):  # torchvision's wheel registers fakes for operators that only its CUDA library has
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["sgl_kernel"] = _Kernels()


if not torch.cuda.is_available():
    _prepare()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")  # whose children then import this file
