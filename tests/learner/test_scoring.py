from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.model.tiled_logprobs import tile_shape, token_scores

M, H, V = 11, 6, 17


def inputs(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target"""
    random = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(size, generator=random, dtype=torch.float64) for size in ((M, H), (V, H), (V,)))
    target = torch.randint(0, V, (M,), generator=random)
    return *(each.to(dtype).requires_grad_() for each in (hidden, weight, bias)), target  # pyright: ignore[reportReturnType]


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logprobs = (logits / temperature).log_softmax(dim=-1)
    return logprobs.gather(1, target[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(dim=-1)


@pytest.mark.parametrize("tile_elements", [1, 9, 3 * V, 4 * V + 5, 100, None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_tiled_scores_and_gradients_equal_those_of_full_logits(
    tile_elements: int | None, with_bias: bool, entropy_grad: bool
) -> None:
    hidden, weight, full_bias, target = inputs()
    bias = full_bias if with_bias else None
    leaves = [each for each in (hidden, weight, bias) if each is not None]
    of_logprob, of_entropy = torch.randn(2, M, dtype=torch.float64)
    wanted = plain(hidden, weight, bias, target, 0.7)
    entropy = wanted[1] if entropy_grad else wanted[1].detach()
    wanted_grads = torch.autograd.grad((wanted[0] * of_logprob + entropy * of_entropy).sum(), leaves)
    found = token_scores(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=0.7,
        entropy_grad=entropy_grad,
        tile_elements=tile_elements,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((found[0] * of_logprob + found[1] * of_entropy).sum(), leaves)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-12, atol=1e-12)


def test_entropy_alone_can_be_differentiated() -> None:
    hidden, weight, _, target = inputs()
    wanted = torch.autograd.grad(plain(hidden, weight, None, target, 1.0)[1].sum(), [hidden, weight])
    entropy = token_scores(hidden, weight, target, entropy_grad=True, tile_elements=2 * V)[1]
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), [hidden, weight]), wanted, rtol=1e-12, atol=1e-12)


def test_a_frozen_output_embedding_gets_no_gradient() -> None:
    hidden, weight, _, target = inputs()
    weight.requires_grad_(False)
    token_scores(hidden, weight, target)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bf16_inputs_get_an_fp32_softmax_and_fp32_gradient_sums() -> None:
    hidden, weight, _, target = inputs(torch.bfloat16)
    logprob, entropy = token_scores(hidden, weight, target, tile_elements=V)
    assert logprob.dtype is entropy.dtype is torch.float32
    logits = (hidden @ weight.T).float()
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1))
    logprob.sum().backward()
    assert weight.grad is not None
    one_hot = torch.nn.functional.one_hot(target, V)
    wanted = (one_hot - logits.softmax(-1)).bfloat16().double().T @ hidden.double()
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=2**-6, atol=2**-6)  # of a logit's gradient


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "tile"),
    [
        (128, 150_000, (128, 4055)),
        (10_000, 150_000, (726, 722)),
        (10_000, 1000, (524, 1000)),
        (10_000, 8192, (767, 683)),
        (10_000, 98, (5349, 98)),
        (0, 9, (1, 9)),
        (3, 5, (3, 5)),
    ],
)
def test_tile_shapes_respect_the_limit_and_are_about_square(
    num_rows: int, num_columns: int, tile: tuple[int, int]
) -> None:
    found = tile_shape(num_rows, num_columns, 2**19)
    assert found == tile
    assert found[0] * found[1] <= 2**19


def test_extreme_logits_give_finite_exact_scores() -> None:
    """Logits of +-300; the largest is in the last tile, or in the first."""
    logits = torch.tensor([[-300.0, 0.0, 300.0, 299.0], [300.0, 299.0, 0.0, -300.0]], dtype=torch.float64)
    hidden, weight = torch.eye(2, dtype=torch.float64), logits.T.contiguous()
    found = token_scores(hidden, weight, torch.tensor([3, 3]), tile_elements=2)
    wanted = plain(hidden, weight, None, torch.tensor([3, 3]), 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_no_tokens_give_empty_scores_and_a_zero_gradient() -> None:
    hidden, weight, _, target = inputs()
    logprob, entropy = token_scores(hidden[:0], weight, target[:0])
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("num_rows", [1, 8, 100])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_scores_over_a_large_vocabulary_are_exact_in_fp32(num_rows: int, spread: float) -> None:
    """One probable token and 49,151 improbable ones, whose small terms must not be lost in the sum."""
    vocab_size = 49_152
    logits = -11.0 + spread * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    logits[7] = 0.0
    target = torch.full((num_rows,), 7)
    logprob, entropy = token_scores(torch.ones(num_rows, 1), logits[:, None], target)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprob.double(), exact[target], rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum().expand(num_rows), rtol=1e-5, atol=0)
