from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.importance_weights import (
    correction_weights,
    make_corrections,
    masked_weights,
    needs_prepass,
    second_moment_mask,
    truncated_weights,
)
from protocol.algorithm_config import CorrectionConfig, Scope
from tests.learner.configs import correction
from tests.learner.flat import Flat, flat_tokens
from tests.learner.properties import deterministic
from tests.learner.reference import reference_corrections

SCOPES: tuple[Scope, ...] = ("token", "context", "trajectory")
RATIOS = ("geometric", "product", "worst")
KINDS: tuple[tuple[CorrectionConfig, ...], ...] = (
    (),
    *((correction("truncate", scope=s, ratio=r, high=1.2),) for s in SCOPES for r in ("geometric", "product")),
    *((correction("mask", scope=s, ratio=r, low=0.7, high=1.3),) for s in SCOPES for r in ("geometric", "product")),
    *(
        (correction("reject", scope=s, ratio=r, low=0.7, high=1.3),)
        for s in SCOPES
        for r in ("geometric", "product", "worst")
    ),
    *((correction("reject_negative", scope=s, threshold=0.1),) for s in SCOPES),
    (correction("second_moment", threshold=0.05),),
    (
        correction("truncate", high=1.1),
        correction("reject", scope="context"),
        correction("second_moment", threshold=0.1),
    ),
)


def weights_of(flat: Flat, corrections: tuple[CorrectionConfig, ...]) -> np.ndarray:
    return correction_weights(
        flat.column("proximal"),
        flat.column("behavior"),
        advantages=flat.column("advantages"),
        context=flat.index("context"),
        trajectory=flat.index("trajectory"),
        corrections=make_corrections(corrections),
    ).numpy()


@pytest.mark.parametrize("corrections", KINDS, ids=lambda each: "+".join(c.model_dump_json() for c in each) or "none")
@settings(deterministic, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_weights_equal_the_reference(corrections: tuple[CorrectionConfig, ...], seed: int) -> None:
    flat = flat_tokens(seed)
    wanted = reference_corrections(flat.tokens, flat.proximal.tolist(), corrections)
    np.testing.assert_allclose(weights_of(flat, corrections), wanted, rtol=1e-9)


@pytest.mark.parametrize("corrections", [each for each in KINDS if each])
def test_weights_without_prepass_are_the_same_for_each_context_alone(
    corrections: tuple[CorrectionConfig, ...],
) -> None:
    """`needs_prepass` is true exactly if they differ for some seed."""
    same = True
    for seed in range(30):
        flat = flat_tokens(seed)
        whole = weights_of(flat, corrections)
        for context in {token.context for token in flat.tokens}:
            at = [n for n, token in enumerate(flat.tokens) if token.context == context]
            same &= np.allclose(weights_of(flat.select(at), corrections), whole[at])
    assert same != needs_prepass(make_corrections(corrections))


def test_needs_prepass() -> None:
    assert not needs_prepass([])
    assert not needs_prepass(make_corrections([correction("truncate"), correction("reject")]))
    assert needs_prepass(make_corrections([correction("truncate"), correction("mask", scope="trajectory")]))
    assert needs_prepass(make_corrections([correction("second_moment")]))


@deterministic
@given(st.lists(st.floats(-3, 3, width=16), max_size=30), st.randoms())
def test_second_moment_mask_keeps_as_many_tokens_as_the_threshold_allows(log_ratios: list[float], random) -> None:
    threshold = 0.3
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    kept = second_moment_mask(log_ratio, threshold=threshold)
    assert not kept.any() or log_ratio[kept].square().mean() <= threshold
    if not kept.all():
        dropped = log_ratio[~kept].square().min()
        assert log_ratio[kept | (log_ratio.square() == dropped)].square().mean() > threshold
        assert not kept.any() or log_ratio[kept].square().max() < dropped
    order = list(range(len(log_ratios)))
    random.shuffle(order)
    assert second_moment_mask(log_ratio[order], threshold=threshold).tolist() == kept[order].tolist()


def test_capped_and_masked_ratios_stay_finite_on_overflow() -> None:
    huge = torch.tensor([200.0, -200.0, 0.0])
    assert truncated_weights(huge, high=2.0).tolist() == [2.0, 0.0, 1.0]
    assert masked_weights(huge, low=0.5, high=2.0).tolist() == [0.0, 0.0, 1.0]


def test_weights_carry_no_gradient() -> None:
    proximal = torch.zeros(2, requires_grad=True)
    index = torch.zeros(2, dtype=torch.int64)
    for each in itertools.chain.from_iterable(KINDS):
        found = correction_weights(
            proximal,
            torch.ones(2),
            advantages=proximal,
            context=index,
            trajectory=index,
            corrections=make_corrections([each]),
        )
        assert not found.requires_grad
        assert found.dtype == torch.float32
