"""The HTTP server: invalid input, pauses, aborts, API keys, model folders and addresses."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import aiohttp
import orjson
import pytest
from pydantic import ValidationError

from actor.engine.request_bodies import GenerateBody, parse_body
from actor.engine.server import EngineServer
from protocol.errors import ConfigError, DataError, EngineRefused, SecurityError, UnreachableError
from tests.engine.conftest import CONTEXT_LENGTH, VOCAB_SIZE, Client

BAD_BODIES = [
    ({}, ["input_ids"]),
    ({"input_ids": []}, ["input_ids", "0"]),
    ({"input_ids": [[1], []]}, ["input_ids[1]", "0"]),
    ({"input_ids": [1, VOCAB_SIZE]}, ["input_ids", str(VOCAB_SIZE)]),
    ({"input_ids": [1, -1]}, ["input_ids", "-1"]),
    ({"input_ids": [1, "two"]}, ["input_ids", "two"]),
    ({"input_ids": [1, 2.5]}, ["input_ids", "2.5"]),
    ({"input_ids": [True]}, ["input_ids", "True"]),
    ({"input_ids": [1, 2**80]}, ["input_ids"]),
    ({"input_ids": [1] * CONTEXT_LENGTH}, ["input_ids", str(CONTEXT_LENGTH)]),
    ({"input_ids": [1] * 12, "sampling_params": {"max_new_tokens": 501}}, ["max_new_tokens", "512", "513"]),
    ({"input_ids": [1], "sampling_params": {"temprature": 1}}, ["sampling_params.temprature", "1"]),
    ({"input_ids": [1], "sampling_params": {"temperature": -0.5}}, ["sampling_params.temperature", "0", "-0.5"]),
    ({"input_ids": [1], "sampling_params": {"temperature": None}}, ["sampling_params.temperature", "None"]),
    ({"input_ids": [1], "sampling_params": {"top_p": 0}}, ["sampling_params.top_p", "0"]),
    ({"input_ids": [1], "sampling_params": {"top_k": 0}}, ["top_k", "0"]),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": -1}}, ["sampling_params.max_new_tokens", "-1"]),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}}, ["min_new_tokens", "3"]),
    ({"input_ids": [1], "sampling_params": {"repetition_penalty": 1.1}}, ["repetition_penalty", "1.1"]),
    ({"input_ids": [1], "sampling_params": {"n": 2}}, ["sampling_params.n", "2"]),
    ({"input_ids": [[1], [2]], "sampling_params": [{}]}, ["sampling_params", "2", "1"]),
    ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, ["rid", "a"]),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": 600}}, ["max_new_tokens", "512", "600"]),
    ({"input_ids": [1], "rid": 7}, ["rid", "7"]),
    ({"input_ids": [1], "stream": True}, ["stream", "True"]),
    ({"text": "w1"}, ["input_ids"]),
    ({"input_ids": [1], "colour": "red"}, ["colour", "red"]),
    ([1, 2], ["object"]),
]


async def test_invalid_requests_are_refused_and_the_server_keeps_serving(client: Client) -> None:
    for body, words in BAD_BODIES:
        reply = await client.post("/generate", body)
        assert reply.status == 400, body
        for word in words:
            assert word in reply.body["error"]["message"], body
    for path, body in (
        ("/pause_generation", {"mode": "sideways"}),
        ("/abort_request", {}),
        ("/update_weights_from_disk", {"weight_version": "v1"}),
        ("/update_weights_from_disk", {"model_path": 3}),
    ):
        assert (await client.post(path, body)).status == 400, path
    for raw in (b"{", b"\xff\xfe", b"null"):
        headers = {"Content-Type": "application/json"}
        async with client.http.post(client.url + "/generate", data=raw, headers=headers) as response:
            assert response.status == 400
            assert "error" in await response.json()
    assert (await client.post("/nowhere")).status == 404
    assert (await client.get("/generate")).status == 405
    # Accepted: stop tokens outside the vocabulary, and any integer as a seed.
    odd = {"stop_token_ids": [-1000, 10**12], "min_new_tokens": 3, "sampling_seed": -(2**70), "max_new_tokens": 5}
    assert len((await client.generate([1], **odd))["output_ids"]) == 5
    assert (await client.get("/health")).status == 200


async def test_a_long_invalid_body_is_refused_at_its_first_invalid_entry(client: Client) -> None:
    """Bodies are parsed in the event loop that makes steps: an untrusted body must not block it."""
    num = 16 * CONTEXT_LENGTH // 2  # half of the longest body that the server reads
    for bad in (["x"] * num, [["x"]] * num, [[1, "x"]] * num, [None] * num):
        with pytest.raises(EngineRefused) as raised:
            parse_body(GenerateBody, orjson.dumps({"input_ids": bad}))
        cause = raised.value.__cause__
        assert isinstance(cause, ValidationError)
        assert cause.error_count() <= 4, "validation stops at the first invalid entry"
    too_long = {"input_ids": [10**9] * 16 * CONTEXT_LENGTH * 2}
    assert (await client.post("/generate", too_long)).status == 413
    assert len((await client.generate([1], max_new_tokens=2))["output_ids"]) == 2


async def test_a_full_queue_refuses_requests_with_503(serve: Callable, folder: Path) -> None:
    client: Client = await serve(folder, max_running_requests=1, min_queue_capacity=1)
    await client.post("/pause_generation", {"mode": "retract"})
    batch = {"input_ids": [[1]] * 31, "sampling_params": {"max_new_tokens": 1}}
    waiting = [asyncio.create_task(client.post("/generate", batch))]
    while (await client.get("/server_info")).body["internal_states"][0]["num_waiting_reqs"] < 31:
        pass
    waiting.append(asyncio.create_task(client.post("/generate", {**batch, "input_ids": [1]})))
    while (await client.get("/server_info")).body["internal_states"][0]["num_waiting_reqs"] < 32:
        pass
    reply = await client.post("/generate", {**batch, "input_ids": [1]})
    assert reply.status == 503
    assert "at most 32 requests and has room for 0, got 1 more" in reply.body["error"]["message"]
    reply = await client.post("/generate", {**batch, "input_ids": [[1]] * 33})
    assert (reply.status, "<= 32 sequences" in reply.body["error"]["message"]) == (400, True)
    await client.post("/continue_generation")
    assert [(await task).status for task in waiting] == [200, 200]
    assert (await client.post("/generate", batch)).status == 200


async def test_a_batch_gets_its_responses_in_order(client: Client) -> None:
    body = {
        "input_ids": [[1, 2], [3], [4, 5, 6]],
        "sampling_params": [{"max_new_tokens": n} for n in (9, 1, 4)],
        "rid": "many",
        "return_logprob": [True, False, True],
        "extra_key": "salt",
    }
    answers = (await client.post("/generate", body)).body
    assert [len(a["output_ids"]) for a in answers] == [9, 1, 4]
    assert [a["meta_info"]["id"] for a in answers] == ["many_0", "many_1", "many_2"]
    assert ["output_token_logprobs" in a["meta_info"] for a in answers] == [True, False, True]


async def test_requests_wait_while_the_engine_is_paused(client: Client) -> None:
    await client.post("/pause_generation", {"mode": "retract"})
    await client.post("/pause_generation", {"mode": "retract"})
    waiting = [asyncio.create_task(client.generate([1], rid=f"r{i}", max_new_tokens=3)) for i in range(3)]
    while (await client.get("/server_info")).body["internal_states"][0]["num_waiting_reqs"] < 3:
        pass
    assert await client.num_running() == 0
    assert (await client.get("/health")).status == 200
    assert (await client.get("/flush_cache")).status == 200
    # A duplicate id is refused, and a waiting request can be aborted.
    assert (await client.post("/generate", {"input_ids": [1], "rid": "r0"})).status == 400
    await client.post("/abort_request", {"rid": "r1"})
    assert (await waiting[1])["meta_info"]["finish_reason"]["type"] == "abort"
    await client.post("/continue_generation")
    assert len((await waiting[0])["output_ids"]) == len((await waiting[2])["output_ids"]) == 3


async def test_an_aborted_request_returns_its_partial_output(client: Client) -> None:
    tasks = [asyncio.create_task(client.generate([1], rid=f"r{i}", max_new_tokens=500)) for i in range(4)]
    await client.until_running(4)
    assert (await client.get("/flush_cache")).status == 400
    await client.post("/abort_request", {"rid": "r2"})
    answer = await tasks[2]
    num = len(answer["output_ids"])
    assert 0 < num < 500
    assert len(answer["meta_info"]["output_token_logprobs"]) == answer["meta_info"]["completion_tokens"] == num
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["meta_info"]["finish_reason"]["message"]
    await client.post("/abort_request", {"abort_all": True})
    assert {(await task)["meta_info"]["finish_reason"]["type"] for task in tasks} == {"abort"}
    assert (await client.post("/abort_request", {"rid": "unknown"})).status == 200

    task = asyncio.create_task(client.generate([1], max_new_tokens=500))
    await client.until_running(1)
    await client.post("/pause_generation")
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_an_update_can_abort_requests_in_flight(client: Client, new_weights: Path) -> None:
    task = asyncio.create_task(client.generate([1], max_new_tokens=500))
    await client.until_running(1)
    body = {"model_path": str(new_weights), "weight_version": "v1", "abort_all_requests": True}
    assert (await client.post("/update_weights_from_disk", body)).status == 200
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_a_client_that_disconnects_frees_its_row(client: Client) -> None:
    task = asyncio.create_task(client.generate([1], max_new_tokens=511))
    await client.until_running(1)
    await client.post("/pause_generation", {"mode": "in_place"})
    task.cancel()
    while await client.num_running():
        pass
    await client.post("/continue_generation")
    assert len((await client.generate([1], max_new_tokens=2))["output_ids"]) == 2


async def test_every_route_except_health_needs_the_api_key(serve: Callable, folder: Path) -> None:
    client: Client = await serve(folder, api_key="s3cret")
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    assert (await client.get("/health")).status == 200
    assert (await client.get("/model_info")).status == 401
    assert (await client.post("/generate", body)).status == 401
    for header, status in (("Bearer wrong", 401), ("Bearer s3cret", 200)):
        async with client.http.post(client.url + "/generate", json=body, headers={"Authorization": header}) as response:
            assert response.status == status


async def test_model_info_and_server_info(client: Client, folder: Path) -> None:
    info = (await client.get("/model_info")).body
    assert (info["model_path"], info["is_generation"], info["weight_version"]) == (str(folder), True, "default")
    assert info["model_type"] == "qwen2"
    server = (await client.get("/server_info")).body
    assert (server["status"], server["context_length"], server["vocab_size"]) == ("ready", CONTEXT_LENGTH, VOCAB_SIZE)
    assert server["max_total_num_tokens"] == 128 * CONTEXT_LENGTH


async def test_context_length_lowers_the_models_own_and_never_raises_it(serve: Callable, folder: Path) -> None:
    for requested, served in ((64, 64), (CONTEXT_LENGTH + 1, CONTEXT_LENGTH)):
        client: Client = await serve(folder, context_length=requested)
        assert (await client.get("/server_info")).body["context_length"] == served
        reply = await client.post("/generate", {"input_ids": [1] * served})
        assert (reply.status, str(served) in reply.body["error"]["message"]) == (400, True)


async def test_a_model_folder_that_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, word in (
        ("config.json", "config.json"),
        ("model.safetensors", "safetensors"),
        ("tokenizer", "tokenizer"),
    ):
        broken = tmp_path / name.split(".")[0]
        shutil.copytree(folder, broken)
        for file in broken.glob(f"{name}*"):
            file.unlink()
        server = EngineServer(model_path=broken)
        with pytest.raises(DataError, match=word) as raised:
            await server.start()
        assert str(broken) in str(raised.value)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        broken = tmp_path / f"truncated-{name}"
        shutil.copytree(folder, broken)
        data = (broken / name).read_bytes()
        (broken / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(DataError) as raised:
            await EngineServer(model_path=broken).start()
        assert str(broken) in str(raised.value)
    with pytest.raises(DataError, match="does not exist"):
        await EngineServer(model_path=tmp_path / "nowhere").start()


async def test_invalid_addresses_and_bounds_are_refused(client: Client, folder: Path) -> None:
    port = int(client.url.rpartition(":")[2])
    with pytest.raises(UnreachableError, match=str(port)):
        await EngineServer(model_path=folder, port=port).start()
    with pytest.raises(SecurityError, match=r"network\.api_key_file"):
        EngineServer(model_path=folder, host="0.0.0.0")
    with pytest.raises(ConfigError, match="max_running_requests must be >= 1, got 0"):
        EngineServer(model_path=folder, max_running_requests=0)
    assert (await client.get("/health")).status == 200


async def test_stop_frees_the_port_and_aborts_requests(folder: Path) -> None:
    server = EngineServer(model_path=folder)
    await server.start()
    async with aiohttp.ClientSession() as http:
        client = Client(server.url, http)
        task = asyncio.create_task(client.generate([1], max_new_tokens=500))
        await client.until_running(1)
        await client.post("/pause_generation", {"mode": "in_place"})
        await server.stop()
        assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    again = EngineServer(model_path=folder, port=int(server.url.rpartition(":")[2]))
    await again.start()
    await again.stop()


async def test_a_failed_step_aborts_requests_and_ends_the_engine_with_its_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actor.engine.model_runner import ModelRunner

    def fail(*_: object) -> None:
        raise MemoryError("no more")

    server = EngineServer(model_path=folder)
    await server.start()
    monkeypatch.setattr(ModelRunner, "run", fail)
    async with aiohttp.ClientSession() as http:
        client = Client(server.url, http)
        answer = await client.generate([1], max_new_tokens=5)
        assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "the engine has failed"}
        with pytest.raises(MemoryError, match="no more"):
            await server.wait()
        assert (await client.get("/health")).status == 503
        assert (await client.post("/generate", {"input_ids": [1]})).status == 503
    await server.stop()
