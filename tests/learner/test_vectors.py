"""Advantages, corrections and losses against numeric cases from the tests of other projects, one test per case."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.learner.vectors import ADAPTERS, Row

DATA = Path(os.environ.get("PALIMPSEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
VECTORS = DATA / "vectors" / "rl_vectors.jsonl"

NOT_BUILT = {
    "prox_logp_loglinear": "not built: proximal log-probs are computed, not interpolated",
    "prox_logp_linear": "not built: proximal log-probs are computed, not interpolated",
}
"""Operations of the vectors that the learner does not have, and why."""


def check(row: Row) -> None:
    """Asserts that all expected outputs are equal and that the adapter used all inputs and parameters."""
    found = ADAPTERS[row.op](row)
    assert row.expected.keys() <= found.keys(), f"the adapter of {row.op} has no output {row.expected.keys()}"
    assert row.unread == [], f"the adapter of {row.op} ignores {row.unread}"
    for name, wanted in row.expected.items():
        array = np.asarray(wanted, dtype=float)
        compared = np.broadcast_to(~np.ma.getmaskarray(found[name]), array.shape)
        values = np.broadcast_to(np.asarray(found[name]), array.shape)
        np.testing.assert_allclose(values[compared], array[compared], **row.tolerance, err_msg=f"{row.name}: {name}")


def rows() -> list[Row]:
    return [Row(json.loads(line)) for line in VECTORS.read_text().splitlines()] if VECTORS.exists() else []


needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason=f"no vectors at {VECTORS}; set PALIMPSEST_DATA")


@needs_vectors
def test_every_built_operation_has_a_published_vector() -> None:
    assert {row.op for row in rows()} >= ADAPTERS.keys()


@needs_vectors
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_published_vector(row: Row) -> None:
    if row.op in NOT_BUILT:
        pytest.skip(NOT_BUILT[row.op])
    check(row)


def case(op: str, inputs: dict, params: dict, expected: dict) -> Row:
    return Row(
        {"id": "", "op": op, "inputs": inputs, "params": params, "expected": expected, "rtol": 1e-6, "atol": 1e-9}
    )


@pytest.mark.parametrize(
    "row",
    [
        case("sequence_mask", {"ratio": [[4.0, 1.0]]}, {"low": 1.5, "high": None}, {"mask": [[1.0]]}),
        case("sequence_mask", {"ratio": [[4.0, 1.0]]}, {"low": None, "high": 1.5}, {"mask": [[0.0]]}),
        case("sequence_mask", {"ratio": [[4.0, 1.0]]}, {"high": 2.0, "level": "token"}, {"mask": [[0.0, 1.0]]}),
        case(
            "tis_ratio",
            {"ratio": [[2.0, 3.0], [0.5, 1.0]], "mask": [[1, 1], [1, 0]]},
            {"level": "sequence", "cap": 5.0},
            {"ratio": [[5.0], [0.5]], "capped_fraction": 0.5},
        ),
        case(
            "behave_weight_clamp",
            {"ratio": [[4.0, 1.0], [9.0, 1.0]]},
            {"level": "sequence", "upper": 2.5},
            {"weight": [[2.0, 2.0], [2.5, 2.5]]},
        ),
        case(
            "reject_mask_ratio",
            {"ratio": [[4.0, 1.0], [9.0, 1.0]]},
            {"level": "sequence", "upper": 2.5, "lower": None},
            {"mask": [[1.0, 1.0], [0.0, 0.0]]},
        ),
        case("group_centered_advantage", {"rewards": [1.0, 0.0]}, {}, {"advantages": [0.5, -0.5], "sum": 0.0}),
        case("maxrl_scalar_advantage", {"rewards": [1.0, 1.0]}, {}, {"sum": 0.0}),
    ],
    ids=lambda row: row.op,
)
def test_adapters_support_null_bounds_ratio_inputs_sequence_levels_and_sums(row: Row) -> None:
    check(row)


def test_an_adapter_must_use_every_parameter() -> None:
    row = case("maxrl_scalar_advantage", {"rewards": [1.0, 1.0]}, {"eps": 1.0}, {"sum": 0.0})
    with pytest.raises(AssertionError, match=r"ignores \['eps'\]"):
        check(row)
