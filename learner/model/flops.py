"""Floating-point operations of a training step, and the peak of the devices, for MFU (model FLOPs utilisation)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

_PEAK_BF16_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}
"""Dense bf16, from the vendors' data sheets, by a substring of the device's name."""


def training_flops(model: PreTrainedModel, *, num_tokens: int, num_scored: int, num_forwards: int = 0) -> float:
    """6 P U + 6 V H M for forward and backward of U tokens with logits at M of them, plus 2 P U + 2 V H M per forward.

    num_tokens: U; num_scored: M; num_forwards: further forward passes. A frozen weight has factor 4 instead of 6,
    because its gradient is not computed. P counts all parameters except the embeddings. The quadratic part of attention
    is left out, so MFU is a lower bound.
    Source: Kaplan et al. 2020, section 2.1.
    """
    head = _parameters(model.get_output_embeddings())
    apart = {id(p) for p in (*_parameters(model.get_input_embeddings()), *head)}

    def per_token(parameters: list[nn.Parameter]) -> float:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return (4.0 + 2.0 * num_forwards) * sum(p.numel() for p in parameters) + 2.0 * trained

    body = [p for p in model.parameters() if id(p) not in apart]
    return per_token(body) * num_tokens + per_token(head) * num_scored


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in dense bf16 FLOP/s; None if it is not known, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_BF16_TFLOPS.items() if part in name), None)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())
