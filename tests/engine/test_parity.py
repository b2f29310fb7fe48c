"""The engine's log-probs equal those of a plain transformers forward pass, also across pauses and weight updates."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import Client, reference_logprobs, sampled_logprobs

TOLERANCE = 1e-4


def prompts(num: int, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(50) for _ in range(rng.randint(1, 60))] for _ in range(num)]


def assert_parity(model_path: Path, prompt: list[int], answer: dict, *, temperature: float = 1.0) -> None:
    expected = reference_logprobs(model_path, prompt, answer["output_ids"], temperature=temperature)
    torch.testing.assert_close(sampled_logprobs(answer), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
async def test_logprobs_match_in_a_mixed_batch(
    serve: Callable, make_folder: Callable[..., Path], architecture: str, tied: bool
) -> None:
    """More requests than rows, with different prompt and output lengths: sequences start and end at any step."""
    model_path = make_folder(seed=3, architecture=architecture, tied=tied)
    client: Client = await serve(model_path, max_running_requests=5)
    requests = prompts(16)
    answers = await asyncio.gather(
        *(client.generate(p, max_new_tokens=1 + 3 * i, temperature=0.7) for i, p in enumerate(requests))
    )
    for i, (prompt, answer) in enumerate(zip(requests, answers, strict=True)):
        assert len(answer["output_ids"]) == 1 + 3 * i
        assert_parity(model_path, prompt, answer, temperature=0.7)


async def test_logprobs_match_the_new_weights_after_an_update(client: Client, folder: Path, new_weights: Path) -> None:
    prompt = prompts(1)[0]
    before = await client.generate(prompt, max_new_tokens=20)
    assert_parity(folder, prompt, before)
    assert before["meta_info"]["weight_version"] == "default"

    reply = await client.post("/update_weights_from_disk", {"model_path": str(new_weights), "weight_version": "v1"})
    assert (reply.status, reply.body["success"], reply.body["num_paused_requests"]) == (200, True, 0)
    assert (await client.get("/model_info")).body["weight_version"] == "v1"
    after = await client.generate(prompt, max_new_tokens=20)
    assert_parity(new_weights, prompt, after)
    assert after["meta_info"]["weight_versions"] == [{"version": "v1", "start": 0, "end": 20}]


async def test_a_retracted_request_continues_with_the_new_weights(
    client: Client, folder: Path, new_weights: Path
) -> None:
    """Tokens before the boundary match the old weights; tokens after it match the new weights on the whole prefix."""
    requests = prompts(4, seed=1)
    running = [asyncio.create_task(client.generate(p, max_new_tokens=400)) for p in requests]
    await client.until_running(4)
    assert (await client.post("/pause_generation", {"mode": "retract"})).status == 200
    assert await client.num_running() == 0
    update = {"model_path": str(new_weights), "weight_version": "v1", "flush_cache": False}
    reply = await client.post("/update_weights_from_disk", update)
    assert (reply.status, reply.body["num_paused_requests"]) == (200, 4)
    assert not any(task.done() for task in running)
    assert (await client.post("/continue_generation")).status == 200

    for prompt, answer in zip(requests, await asyncio.gather(*running), strict=True):
        old, new = answer["meta_info"]["weight_versions"]
        boundary = old["end"]
        assert (old, new) == (
            {"version": "default", "start": 0, "end": boundary},
            {"version": "v1", "start": boundary, "end": 400},
        )
        assert 0 < boundary < 400
        assert answer["meta_info"]["num_retractions"] == 1
        output, logprobs = answer["output_ids"], sampled_logprobs(answer)
        under_old = reference_logprobs(folder, prompt, output)
        under_new = reference_logprobs(new_weights, prompt, output)
        torch.testing.assert_close(logprobs[:boundary], under_old[:boundary], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(logprobs[boundary:], under_new[boundary:], atol=TOLERANCE, rtol=0)


async def test_version_spans_are_exact_across_many_updates(serve: Callable, folder: Path, new_weights: Path) -> None:
    """With few rows and eight updates, each token was sampled by the weights that its span states."""
    client: Client = await serve(folder, max_running_requests=6)
    paths = {"default": folder} | {f"v{k}": new_weights if k % 2 == 0 else folder for k in range(8)}
    requests = prompts(20, seed=4)
    running = [asyncio.create_task(client.generate(p, max_new_tokens=200)) for p in requests]
    for k in range(8):
        await client.until_running(1)
        await client.post("/pause_generation", {"mode": "retract"})
        update = {"model_path": str(paths[f"v{k}"]), "weight_version": f"v{k}"}
        assert (await client.post("/update_weights_from_disk", update)).status == 200
        await client.post("/continue_generation")
    num_spans = 0
    for prompt, answer in zip(requests, await asyncio.gather(*running), strict=True):
        under = {path: reference_logprobs(path, prompt, answer["output_ids"]) for path in (folder, new_weights)}
        logprobs = sampled_logprobs(answer)
        spans = answer["meta_info"]["weight_versions"]
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == 200
        for span in spans:
            tokens = slice(span["start"], span["end"])
            expected = under[paths[span["version"]]][tokens]
            torch.testing.assert_close(logprobs[tokens], expected, atol=TOLERANCE, rtol=0)
        num_spans += len(spans)
    assert num_spans > len(requests)


async def test_a_pause_in_place_keeps_the_kv_cache(client: Client, folder: Path, new_weights: Path) -> None:
    """Without an update the output does not change; with an update, the spans state the boundary."""
    prompt = prompts(1, seed=2)[0]
    alone = await client.generate(prompt, max_new_tokens=300, sampling_seed=5)
    task = asyncio.create_task(client.generate(prompt, max_new_tokens=300, sampling_seed=5))
    await client.until_running(1)
    await client.post("/pause_generation", {"mode": "in_place"})
    assert await client.num_running() == 1
    await client.post("/continue_generation")
    answer = await task
    assert answer["output_ids"] == alone["output_ids"]
    assert answer["meta_info"]["num_retractions"] == 0

    task = asyncio.create_task(client.generate(prompt, max_new_tokens=300))
    await client.until_running(1)
    await client.post("/pause_generation", {"mode": "in_place"})
    update = {"model_path": str(new_weights), "weight_version": "v1"}
    refused = await client.post("/update_weights_from_disk", update)
    assert refused.status == 400
    assert "flush_cache" in refused.body["message"]
    assert (await client.get("/model_info")).body["weight_version"] == "default"
    assert (await client.post("/update_weights_from_disk", update | {"flush_cache": False})).status == 200
    await client.post("/continue_generation")
    spans = (await task)["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "v1"]
    assert spans[0]["end"] == spans[1]["start"]


async def test_an_update_without_a_pause_waits_for_requests_in_flight(
    client: Client, folder: Path, new_weights: Path
) -> None:
    prompt = prompts(1)[0]
    task = asyncio.create_task(client.generate(prompt, max_new_tokens=300))
    await client.until_running(1)
    update = asyncio.create_task(
        client.post("/update_weights_from_disk", {"model_path": str(new_weights), "weight_version": "v1"})
    )
    old = await task
    assert [span["version"] for span in old["meta_info"]["weight_versions"]] == ["default"]
    assert_parity(folder, prompt, old)
    assert (await update).status == 200
    assert_parity(new_weights, prompt, await client.generate(prompt, max_new_tokens=10))


async def test_a_refused_update_changes_nothing(
    client: Client, folder: Path, new_weights: Path, tmp_path: Path
) -> None:
    good = load_file(new_weights / "model.safetensors")
    some = "model.layers.1.mlp.up_proj.weight"
    broken = {
        "missing": {k: v for k, v in good.items() if k != some},
        "unknown": good | {"model.layers.2.mlp.up_proj.weight": good[some].clone()},
        "shape": good | {some: good[some][:-1].clone()},
        "finite": good | {some: torch.full_like(good[some], torch.nan)},
        "tied": good | {"lm_head.weight": good["model.embed_tokens.weight"] + 1},
    }
    for word, weights in broken.items():
        bad = tmp_path / word
        bad.mkdir()
        save_file(weights, bad / "model.safetensors")
        reply = await client.post("/update_weights_from_disk", {"model_path": str(bad), "weight_version": "bad"})
        assert reply.status == 400
        assert reply.body["success"] is False
        assert word in reply.body["message"]
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    data = (new_weights / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    for bad in (truncated, tmp_path / "nowhere", tmp_path):
        reply = await client.post("/update_weights_from_disk", {"model_path": str(bad)})
        assert reply.status == 400
        assert str(bad) in reply.body["message"]

    assert (await client.get("/model_info")).body["weight_version"] == "default"
    prompt = prompts(1)[0]
    assert_parity(folder, prompt, await client.generate(prompt, max_new_tokens=10))


async def test_output_that_is_not_finite_aborts_and_does_not_affect_later_requests(
    client: Client, folder: Path, new_weights: Path, tmp_path: Path
) -> None:
    """With weights that overflow, requests are aborted. After the next update, no cache row holds their values."""
    weights = load_file(new_weights / "model.safetensors")
    for name in weights:
        if "v_proj" in name:
            weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, tmp_path / "model.safetensors")
    assert (await client.post("/update_weights_from_disk", {"model_path": str(tmp_path)})).status == 200
    requests = prompts(6)
    for answer in await asyncio.gather(*(client.generate(p, max_new_tokens=10) for p in requests)):
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert "finite" in answer["meta_info"]["finish_reason"]["message"]
    assert (await client.post("/update_weights_from_disk", {"model_path": str(folder)})).status == 200
    answers = await asyncio.gather(*(client.generate(p, max_new_tokens=70) for p in requests))
    for prompt, answer in zip(requests, answers, strict=True):
        assert_parity(folder, prompt, answer)


async def test_contexts_of_several_turns_and_groups_load_their_prefixes(
    serve: Callable, folder: Path, new_weights: Path
) -> None:
    """Eight contexts with the same first prompt, three turns each, on fewer rows; then the same after an update."""
    client: Client = await serve(folder, max_running_requests=5)

    async def context(seed: int, model_path: Path) -> list[int]:
        rng, ids, cached = random.Random(seed), [11] * 30, []
        for _ in range(3):
            answer = await client.generate(ids, max_new_tokens=rng.randint(1, 12))
            assert_parity(model_path, ids, answer)
            cached.append(answer["meta_info"]["cached_tokens"])
            assert cached[-1] < len(ids)
            ids = ids + answer["output_ids"] + [rng.randrange(50) for _ in range(rng.randint(1, 9))]
        return cached

    for model_path, version in ((folder, "default"), (new_weights, "v1")):
        if version != "default":
            update = {"model_path": str(model_path), "weight_version": version}
            assert (await client.post("/update_weights_from_disk", update)).status == 200
        cached = await asyncio.gather(*(context(seed, model_path) for seed in range(8)))
        assert min(turns[0] for turns in cached) == 0, "the first prompt is computed once after each update"
        assert sum(turns[0] > 0 for turns in cached) >= 6
        assert all(turns[1] >= 24 and turns[2] >= 24 for turns in cached)


async def test_a_cache_of_old_weights_is_not_loaded_after_an_update_in_place(
    client: Client, folder: Path, new_weights: Path
) -> None:
    prompt = [7] * 20
    running = asyncio.create_task(client.generate(prompt, max_new_tokens=200))
    await client.until_running(1)
    await client.post("/pause_generation", {"mode": "in_place"})
    update = {"model_path": str(new_weights), "weight_version": "v1", "flush_cache": False}
    assert (await client.post("/update_weights_from_disk", update)).status == 200
    await client.post("/continue_generation")
    mixed = await running
    longer = prompt + mixed["output_ids"] + [3]
    answer = await client.generate(longer, max_new_tokens=5)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert_parity(new_weights, longer, answer)


async def test_a_request_with_an_extra_key_shares_no_prefix(client: Client) -> None:
    for extra_key, cached in ((None, 0), ("salt", 0), (None, 19)):
        body = {"input_ids": [5] * 20, "sampling_params": {"max_new_tokens": 1}, "extra_key": extra_key}
        reply = await client.post("/generate", body)
        assert reply.body["meta_info"]["cached_tokens"] == cached


async def test_flush_cache_forgets_the_prefixes(client: Client) -> None:
    for flushes, cached in ((False, 0), (False, 19), (True, 0)):
        if flushes:
            assert (await client.post("/flush_cache")).status == 200
        answer = await client.generate([5] * 20, max_new_tokens=2)
        assert answer["meta_info"]["cached_tokens"] == cached
