"""The canary: an engine whose log-probs or cache are wrong serves no tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from actor.engines.sampling import SamplingParams
from protocol.errors import EngineUnavailable
from protocol.types import PolicyTag
from protocol.weight_messages import CanaryFields
from tests.weights.conftest import EngineUnderTest, serves
from tests.weights.learner_side import RUN, LearnerSide
from tests.weights.models import scaled_weights

PROMPTS = [[5, 6, 7], [9, 8, 4]]


def canary_of(model: Path, *, scale: float) -> CanaryFields:
    policy = Qwen2ForCausalLM.from_pretrained(model)
    policy.load_state_dict({name: tensor * scale for name, tensor in policy.state_dict().items()})
    with torch.no_grad():
        logits = [policy(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return CanaryFields(prompts=PROMPTS, logprobs=[float(row.log_softmax(-1).max()) for row in logits])


async def test_an_engine_that_computes_with_the_published_weights_commits_them(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    for publication, scale in ((1, 1.0), (2, 1.7)):
        canary = canary_of(model, scale=scale)
        data = scaled_weights(model, scale=scale)
        await learner.publish(data, publication=publication, version=publication, canary=canary)
        await learner.until(serves(learner, publication))
        assert engine.agent.canary_error < 1e-5
    assert engine.agent.paused_s > 0


async def test_an_engine_with_other_log_probs_returns_no_tokens_until_an_installation_succeeds(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    await learner.publish(
        scaled_weights(model, scale=1.0), publication=1, version=0, canary=canary_of(model, scale=1.0)
    )
    await learner.until(serves(learner, 1))
    stop = learner.keep_another_engine_serving()
    wrong = canary_of(model, scale=1.0)
    wrong = wrong.model_copy(update={"logprobs": [value - 0.01 for value in wrong.logprobs]})
    await learner.publish(scaled_weights(model, scale=1.0), publication=2, version=1, canary=wrong)
    await learner.until(lambda: learner.state() == "quarantined" and engine.agent.num_failures >= 2)
    assert "must be within 0.001 nats of the learner's, got 0.01" in learner.error()
    assert learner.serving() == []
    await engine.until_internal_state(lambda state: state["is_paused"])
    with pytest.raises(EngineUnavailable, match="abort"):  # the next attempt aborts it
        await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    stop()
    await learner.publish(
        scaled_weights(model, scale=2.0), publication=3, version=2, canary=canary_of(model, scale=2.0)
    )
    await learner.until(serves(learner, 3))
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 3, 2))}


@pytest.mark.parametrize(
    ("meta_info", "message"),
    [
        ({"cached_tokens": 3}, "found 3 tokens of old weights in the prefix cache"),
        (
            {"weight_versions": [{"version": "run:9:9", "start": 0, "end": 1}]},
            "must be sampled with run:1:0, got run:9:9",
        ),
    ],
)
async def test_a_canary_with_a_cached_prefix_or_of_other_weights_is_refused(
    learner: LearnerSide, engine: EngineUnderTest, model: Path, meta_info: dict[str, object], message: str
) -> None:
    engine.proxy.meta_info = meta_info
    canary = canary_of(model, scale=1.0)
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0, canary=canary)
    await learner.until(lambda: learner.state() == "quarantined")
    assert message in learner.error()
    engine.proxy.meta_info = {}
    await learner.until(serves(learner, 1))


async def test_a_canary_may_share_one_cached_token_with_a_resumed_request(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    """Retracted requests are prefilled before the canary, so a shared first token comes from the prefix cache."""
    engine.proxy.meta_info = {"cached_tokens": 1}
    canary = canary_of(model, scale=1.0)
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0, canary=canary)
    await learner.until(serves(learner, 1))
    assert engine.agent.num_failures == 0


@pytest.mark.parametrize("canary_s", [0.5])
async def test_an_engine_that_does_not_respond_to_the_canary_serves_with_a_warning(
    learner: LearnerSide, engine: EngineUnderTest, model: Path, canary_s: float
) -> None:
    engine.proxy.generate_hangs = True
    canary = canary_of(model, scale=1.0)
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0, canary=canary)
    await learner.until(lambda: f"no response to the canary in {canary_s:g} s" in learner.error())
    assert learner.state() == "serving"
    engine.proxy.generate_hangs = False
    await learner.publish(
        scaled_weights(model, scale=1.1), publication=2, version=1, canary=canary_of(model, scale=1.1)
    )
    await learner.until(serves(learner, 2))
    await learner.until(lambda: learner.error() == "")


async def test_the_last_engine_serves_with_a_warning_although_its_log_probs_differ(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    wrong = canary_of(model, scale=1.0)
    wrong = wrong.model_copy(update={"logprobs": [value - 0.01 for value in wrong.logprobs]})
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0, canary=wrong)
    await learner.until(serves(learner, 1))
    await learner.until(lambda: "no other engine serves" in learner.error())
    assert learner.state() == "serving"
    assert engine.agent.canary_error == pytest.approx(0.01, abs=1e-4)
    await learner.publish(
        scaled_weights(model, scale=1.7), publication=2, version=1, canary=canary_of(model, scale=1.7)
    )
    await learner.until(serves(learner, 2))
    await learner.until(lambda: learner.error() == "")
