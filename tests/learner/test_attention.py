from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from learner.batch.packing import Pack, pack
from learner.model.attention import default_implementation, install, to_device
from learner.model.attention_flex import block_mask, compiled, flex_inputs
from protocol.errors import DataError
from tests.learner.forests import Ids, forests, grown, model_of, plain_attention
from tests.learner.properties import deterministic

STRETCHES = {"short": (1, 2, 9), "mixed": (1, 12, 40, 150), "long": (130, 160)}


def contexts_of(stretches: str, *, seed: int = 0, num_contexts: int = 10) -> list[Ids]:
    return grown(np.random.default_rng(seed), num_contexts=num_contexts, stretches=STRETCHES[stretches])


def heads(row: Pack, *, num_query: int = 4, num_key: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query [1, H, U, D], key and value [1, K, U, D]"""
    torch.manual_seed(0)
    sizes = [(1, number, row.num_unique_tokens, 8) for number in (num_query, num_key, num_key)]
    return [(3 * torch.randn(size, dtype=torch.float64)).to(dtype).requires_grad_() for size in sizes]


def by_ancestors(row: Pack, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Attention with the dense mask and autograd: query i sees key j iff j <= i < subtree_end[j]."""
    number = torch.arange(row.num_unique_tokens)
    visible = (number[None, :] <= number[:, None]) & (number[:, None] < torch.from_numpy(row.subtree_end)[None, :])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def check(row: Pack, inputs: list[Tensor], *, tolerance: float) -> None:
    wanted = by_ancestors(row, *inputs, scale=0.3)
    found = to_device(row, "cpu").plan.attend(*inputs, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    grad = torch.randn(wanted.shape, dtype=torch.float64).to(wanted.dtype)
    wanted_grads = torch.autograd.grad(wanted, inputs, grad)
    grads = torch.autograd.grad(found, inputs, grad)
    for each, other in zip(grads, wanted_grads, strict=True):
        assert (each - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("stretches", STRETCHES)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_block_attention_equals_the_dense_mask(
    stretches: str, share: bool, dtype: torch.dtype, tolerance: float
) -> None:
    row = pack(contexts_of(stretches), share=share)
    check(row, heads(row, dtype=dtype), tolerance=tolerance)


@settings(deterministic, max_examples=40)
@given(contexts=forests())
def test_block_attention_equals_the_dense_mask_on_random_small_forests(contexts: list[Ids]) -> None:
    row = pack(contexts, share=True, min_share=1)
    check(row, heads(row), tolerance=1e-11)


def test_block_attention_supports_ungrouped_heads() -> None:
    row = pack(contexts_of("mixed"), share=True)
    check(row, heads(row, num_query=3, num_key=3), tolerance=1e-12)


def test_bf16_block_attention_is_within_rounding_of_fp64() -> None:
    row = pack(contexts_of("mixed"), share=True)
    inputs = heads(row, dtype=torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    found, wanted = to_device(row, "cpu").plan.attend(*inputs, scale=0.3), by_ancestors(row, *exact, scale=0.3)
    assert found.dtype is torch.bfloat16
    grad = torch.randn(found.shape).bfloat16()
    grads, wanted_grads = torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, exact, grad.double())
    for each, other in zip((found, *grads), (wanted, *wanted_grads), strict=True):
        assert (each.double() - other).norm() <= 0.01 * other.norm()


def test_padding_of_batched_blocks_is_ignored_and_does_not_overflow() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40, size=size) for size in (57, 59, 64)]
    contexts = [np.concatenate([prompts[n % 3], rng.integers(0, 40, size=13 + n)]) for n in range(9)]
    row = pack(contexts, share=True, min_share=1)
    plan = to_device(row, "cpu").plan
    assert len(plan.cross_blocks) == 1  # pyright: ignore[reportAttributeAccessIssue]
    inputs = heads(row)
    check(row, inputs, tolerance=1e-12)
    check(row, [(12 * each).detach().requires_grad_() for each in inputs], tolerance=1e-9)


def test_hundreds_of_small_nodes_need_few_kernel_calls() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 40, size=24) for _ in range(40)]
    contexts = [np.concatenate([groups[n % 40], rng.integers(0, 40, size=rng.integers(20, 30))]) for n in range(400)]
    row = pack(contexts, share=True)
    plan = to_device(row, "cpu").plan
    assert len(row.node_start) > 400
    assert len(plan.self_blocks) + len(plan.cross_blocks) < 20  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_one_compiled_graph_serves_every_size() -> None:
    """With the eager backend. Starts with 4 blocks and 4 heads: equal sizes must not be treated as one."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    attend = compiled(0.3, True, backend=counter)
    device = torch.device("cpu")
    for size in (512, 640, 90, 256, 1024, 2048):
        token_ids, _, plan = flex_inputs(pack([np.arange(size, dtype=np.int32)]), device)
        query, key, value = (torch.randn(1, number, len(token_ids), 16) for number in (4, 2, 2))
        found = attend(query, key, value, plan.block_mask)
        torch.testing.assert_close(found.transpose(1, 2), plan.attend(query, key, value, scale=0.3))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("stretches", STRETCHES)
def test_flex_attention_equals_the_dense_mask(stretches: str) -> None:
    row = pack(contexts_of(stretches), share=True)
    inputs = [each.detach() for each in heads(row, dtype=torch.float32)]
    flex = to_device(row, "cpu", implementation="flex")
    num_added = flex.token_ids.shape[1] - row.num_unique_tokens
    assert (num_added + row.num_unique_tokens) % 128 == 0
    padded = [torch.nn.functional.pad(each, (0, 0, 0, num_added)) for each in inputs]
    found = flex.plan.attend(*padded, scale=0.3)[:, : row.num_unique_tokens]
    torch.testing.assert_close(found, by_ancestors(row, *inputs, scale=0.3), rtol=1e-5, atol=1e-5)


def test_the_flex_block_mask_equals_the_dense_mask() -> None:
    prompt = np.arange(300)
    row = pack([np.concatenate([prompt, each]) for each in contexts_of("mixed")], share=True)
    size = row.num_unique_tokens // 128 * 128
    end = np.minimum(row.subtree_end[:size], size)
    number = np.arange(size)
    dense = (number[None, :] <= number[:, None]) & (number[:, None] < end[None, :])
    blocks = dense.reshape(size // 128, 128, -1, 128).transpose(0, 2, 1, 3).reshape(size // 128, size // 128, -1)
    mask = block_mask(end, torch.device("cpu"))
    assert (mask.to_dense()[0, 0].numpy().astype(bool) == blocks.any(axis=2)).all()
    assert blocks.all(axis=2).any()
    assert mask.full_kv_num_blocks is not None
    assert (mask.full_kv_num_blocks[0, 0].numpy() == blocks.all(axis=2).sum(axis=1)).all()


def test_attention_without_a_plan_is_causal() -> None:
    model = model_of()
    token_ids = torch.randint(0, 40, (2, 30))
    install(model)
    found = model(input_ids=token_ids).logits
    with plain_attention(model):
        torch.testing.assert_close(found, model(input_ids=token_ids).logits)


def test_the_implementation_depends_on_the_device_and_other_devices_are_refused() -> None:
    assert (default_implementation("cpu"), default_implementation("cuda")) == ("blocks", "flex")
    with pytest.raises(DataError, match="type cpu or cuda, got mps"):
        default_implementation("mps")


def test_a_sliding_window_shorter_than_a_context_is_refused() -> None:
    model = model_of()
    install(model)
    row = pack([np.arange(12)])
    inputs = to_device(row, "cpu")
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 11  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="contexts must be <= 11 tokens, got 12"):
        model.get_decoder()(input_ids=inputs.token_ids, position_ids=inputs.position_ids, attention_plan=inputs.plan)
