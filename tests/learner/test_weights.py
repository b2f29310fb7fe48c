"""The canary equals a plain forward of the published weights and does not change a sharded learner."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from learner.model.export import canary
from learner.model.parallel import join
from learner.model.scorer import Scorer
from protocol.weight_messages import CanaryFields
from tests.learner.rank import Learner
from tests.learner.tiny import VOCAB_SIZE, tiny_model


def plain(prompts: list[list[int]], weights: dict[str, torch.Tensor] | None = None) -> list[float]:
    """The largest log-prob after each prompt, in separate forwards."""
    model = tiny_model()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts]
    return [float(row.log_softmax(-1).max()) for row in logits]


def test_canary_log_probs_equal_a_plain_forward() -> None:
    found = canary(Scorer(tiny_model()), device=torch.device("cpu"))
    assert len(found.prompts) == len({prompt[0] for prompt in found.prompts}) == 4, "no common prefix"
    assert all(0 <= token < VOCAB_SIZE for prompt in found.prompts for token in prompt)
    assert found.logprobs == pytest.approx(plain(found.prompts), abs=1e-5)
    assert CanaryFields.model_validate(found.model_dump()) == found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_canary_matches_the_published_weights_and_does_not_change_training(
    dtype: Literal["float32", "bfloat16"], tolerance: float
) -> None:
    with join("cpu") as world:
        learner, undisturbed = Learner(world, dtype=dtype), Learner(world, dtype=dtype)
        for step in range(3):
            found = canary(learner.scorer, device=torch.device("cpu"))
            published = {name: tensor.float() for name, tensor in learner.published().items()}
            assert found.logprobs == pytest.approx(plain(found.prompts, published), abs=tolerance)
            for each in (learner, undisturbed):
                each.train(step, step + 1)
        after, wanted = learner.published(), undisturbed.published()
        assert after.keys() == wanted.keys()
        assert all(torch.equal(after[name], wanted[name]) for name in wanted)
