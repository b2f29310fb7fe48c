"""Starts SGLang's server on a machine without a GPU: `python cpu_server.py --model-path DIR --device cpu ...`.

SGLang can run a small model with PyTorch alone, but three of its imports need CUDA. This module provides replacements
before SGLang is imported; SGLang itself is unchanged. The processes that SGLang spawns import this module too. With a
GPU, nothing is replaced.
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
    """Copies each request's slice of `out_cache_loc` [sum of lengths] to [start, end) of its row of `req_to_token`."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def _missing_kernel(name: str) -> Callable[..., object]:
    def kernel(*_: object, **__: object) -> object:
        raise NotImplementedError(f"sgl_kernel.{name}: not implemented here; a small dense model does not need it")

    return kernel


class _Kernels(types.ModuleType):
    """Replaces `sgl_kernel`, whose wheels are for CUDA only. Has the one kernel that is called; others only import."""

    def __init__(self) -> None:
        super().__init__("sgl_kernel")
        self.__version__ = "0"
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None, is_package=True)
        self.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.endswith("_cpu"):
            return _missing_kernel(name)
        raise AttributeError(name)  # SGLang then works without it, as after a failed import


def _install_replacements() -> None:
    for name in ("nms", "qnms"):  # torchvision registers fake kernels for operators of its CUDA library
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["sgl_kernel"] = _Kernels()


if not torch.cuda.is_available():
    _install_replacements()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")  # its child processes import this file too
