"""The weight agent between a real publisher and the real embedded engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from actor.engine.server import EngineServer
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import UpdateMode
from actor.weights.fetch import WeightFetcher
from protocol.errors import EngineUnavailable, RemoteError
from protocol.request_client import RequestClient
from protocol.types import PolicyTag
from tests.weights.conftest import EngineUnderTest, serves
from tests.weights.learner_side import CHUNK_BYTES, RUN, WAIT_S, LearnerSide
from tests.weights.models import scaled_weights
from tests.weights.test_publisher import request_manifest


async def test_each_publication_is_installed_and_reported(
    learner: LearnerSide, engine: EngineUnderTest, model: Path, tmp_path: Path
) -> None:
    await learner.until(lambda: learner.state() == "joining")
    assert learner.serving() == []
    for version in range(3):
        publication = version + 1
        await learner.publish(scaled_weights(model, scale=1 + version), publication=publication, version=version)
        await learner.until(serves(learner, publication))
        assert await engine.tag() == PolicyTag(RUN, publication, version)
        assert [(known.name, known.url, known.version) for known in learner.serving()] == [
            ("engine-0", engine.server.url, version)
        ]
    assert engine.agent.num_updates == 3
    assert [path.name for path in (tmp_path / "agent").iterdir()] == ["publication-3"]
    assert learner.num_reports > 3


async def test_an_engine_serves_its_older_version_until_a_damaged_chunk_is_fetched_intact(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    await learner.until(serves(learner, 1))
    await learner.publish(scaled_weights(model, scale=1.7), publication=2, version=1)
    repair = learner.damage(base=1, publication=2, position=CHUNK_BYTES + 5)
    await learner.until(lambda: "chunk 1 of publication 2 does not match its checksum" in learner.error())
    assert learner.state() == "serving"
    assert serves(learner, 1)()
    assert await engine.tag() == PolicyTag(RUN, 1, 0), "all or nothing: the engine keeps its weights"
    repair()
    await learner.until(serves(learner, 2))
    assert await engine.tag() == PolicyTag(RUN, 2, 1)
    assert learner.error() == ""


async def test_an_update_that_the_engine_refuses_is_retried(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    """Weights without one tensor pass the checksums and fail in the engine; the next publication is installed."""
    incomplete = dict(list(load_file(model / "model.safetensors").items())[1:])
    await learner.publish(save(incomplete), publication=1, version=0)
    await learner.until(lambda: learner.state() == "quarantined" and engine.agent.num_failures >= 2)
    assert "update_weights_from_disk" in learner.error()
    assert learner.serving() == []
    await learner.publish(scaled_weights(model, scale=1.0), publication=2, version=0)
    await learner.until(serves(learner, 2))
    assert await engine.tag() == PolicyTag(RUN, 2, 0)


async def test_weights_of_another_shape_never_reach_the_engine(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    await learner.until(serves(learner, 1))
    tensors = load_file(model / "model.safetensors")
    await learner.publish(save(tensors | {"model.norm.weight": torch.ones(17)}), publication=2, version=1)
    await learner.until(lambda: learner.state() == "quarantined")
    assert learner.error() == ("publication 2: model.norm.weight must have the shape [16] of the base model, got [17]")
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 1, 0))}
    await learner.publish(scaled_weights(model, scale=2.0), publication=3, version=2)
    await learner.until(serves(learner, 3))


async def test_the_agent_installs_the_newest_publication_if_its_target_is_no_longer_offered(
    learner: LearnerSide, engine: EngineUnderTest, requests: RequestClient, model: Path, tmp_path: Path
) -> None:
    data = scaled_weights(model, scale=1.0)
    await learner.publish(data, publication=1, version=0)
    await learner.until(serves(learner, 1))
    # The agent may get the announcement of publication 2 only when two newer ones have already replaced it.
    for publication in (2, 3, 4):
        data = scaled_weights(model, scale=0.3 + 0.37 * publication)
        await learner.publish(data, publication=publication, version=publication - 1)
    for publication in (1, 2):
        with pytest.raises(RemoteError, match="ask for the newest"):
            await request_manifest(requests, publication)
    for publication in (3, 4):
        assert (await request_manifest(requests, publication)).publication == publication
    fetcher = WeightFetcher(requests=requests, base_model=model, folder=tmp_path / "other")
    with pytest.raises(RemoteError, match="ask for the newest"):
        await fetcher.fetch(PolicyTag(RUN, 2, 1))
    await learner.until(serves(learner, 4))


async def test_an_engine_whose_continue_request_was_lost_is_quarantined_until_it_continues(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    """It serves the new version and is paused: it must not be reported as serving before it continues."""
    engine.proxy.lost_path = "/continue_generation"
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    await learner.until(lambda: learner.state() == "quarantined" and engine.proxy.num_lost >= 2)
    assert await engine.tag() == PolicyTag(RUN, 1, 0)
    assert learner.serving() == []
    assert "the connection broke" in learner.error()
    engine.proxy.lost_path = ""
    await learner.until(serves(learner, 1))
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 1, 0))}


@pytest.mark.parametrize("pause_mode", ["abort", "retract"])
async def test_an_update_aborts_or_retracts_requests_in_flight(
    learner: LearnerSide, engine: EngineUnderTest, model: Path, pause_mode: UpdateMode
) -> None:
    engine.proxy.hides_pauses = True  # the agent would continue the engine that this test pauses
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    await learner.until(serves(learner, 1))
    await engine.client.pause("in_place")
    generating = asyncio.create_task(engine.client.generate([3], SamplingParams(max_new_tokens=40)))
    await engine.until_internal_state(lambda state: state["num_running_reqs"] + state["num_waiting_reqs"] > 0)
    await learner.publish(scaled_weights(model, scale=2.0), publication=2, version=1)
    await learner.until(serves(learner, 2))
    if pause_mode == "abort":
        with pytest.raises(EngineUnavailable, match="abort"):
            await generating
    else:
        assert (await generating).spans[-1].weight_version == str(PolicyTag(RUN, 2, 1))


async def test_reports_continue_while_a_publication_is_fetched(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    await learner.until(serves(learner, 1))
    learner.proxy.manifests_allowed.clear()
    learner.proxy.manifest_requested.clear()
    await learner.publish(scaled_weights(model, scale=2.0), publication=2, version=1)
    async with asyncio.timeout(WAIT_S):
        await learner.proxy.manifest_requested.wait()
    num_reports = learner.num_reports
    await learner.until(lambda: learner.num_reports >= num_reports + 5)
    assert (learner.state(), [engine.publication for engine in learner.serving()]) == ("serving", [1])
    learner.proxy.manifests_allowed.set()
    await learner.until(serves(learner, 2))


async def test_a_restarted_engine_gets_its_weights_again(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=2.0), publication=1, version=0)
    await learner.until(serves(learner, 1))
    await engine.server.stop()
    await learner.until(lambda: learner.state() == "quarantined" or engine.agent.num_failures > 0)
    again = EngineServer(model_path=model, port=int(engine.server.url.rpartition(":")[2]))
    await again.start()
    try:
        await learner.until(lambda: engine.agent.num_updates == 2)
        await learner.until(serves(learner, 1))
        assert await engine.tag() == PolicyTag(RUN, 1, 0)
    finally:
        await again.stop()


async def test_an_engine_that_other_clients_pause_continues(
    learner: LearnerSide, engine: EngineUnderTest, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    await learner.until(serves(learner, 1))
    for mode in ("abort", "retract", "in_place") * 10:
        await engine.client.pause(mode)
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 1, 0))}
    assert learner.state() == "serving"
