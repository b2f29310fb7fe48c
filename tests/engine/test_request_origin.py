"""What a web page can send is refused; weights come from the agent's folder only (B4)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from actor.engine.update_source import UpdateSource
from tests.engine.conftest import Client

RUN = "run"
BODY = json.dumps({"input_ids": [1], "sampling_params": {"max_new_tokens": 1}})
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({**JSON, "Host": "localhost:{port}"}, 200),
        ({**JSON, "Host": "evil.example"}, 403),
        ({**JSON, "Host": "evil.example:{port}"}, 403),
        ({**JSON, "Host": "127.0.0.1:1"}, 403),
        ({**JSON, "Host": "127.0.0.1.evil.example:{port}"}, 403),
        ({**JSON, "Host": "127.0.0.1:{port}x"}, 403),
        ({**JSON, "Host": ""}, 403),
        ({**JSON, "Origin": "http://evil.example"}, 403),
        ({**JSON, "Origin": "null"}, 403),
        ({**JSON, "Origin": "http://127.0.0.1:1"}, 403),
        ({**JSON, "Origin": "http://127.0.0.1:{port}"}, 200),
        ({**JSON, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
    ],
)
async def test_requests_that_a_web_page_can_send_are_refused(
    client: Client, headers: dict[str, str], status: int
) -> None:
    port = client.url.rpartition(":")[2]
    sent = {name: value.replace("{port}", port) for name, value in headers.items()}
    for path, body in (("/generate", BODY), ("/pause_generation", "{}"), ("/continue_generation", "{}")):
        async with client.http.post(client.url + path, data=body.encode(), headers=sent) as response:
            assert response.status == status, path


async def test_the_advertised_address_is_accepted(serve: Callable, folder: Path) -> None:
    client: Client = await serve(folder, advertised="https://engines.example")
    for host, status in (("engines.example", 200), ("engines.example:443", 403), ("other.example", 403)):
        async with client.http.get(client.url + "/model_info", headers={"Host": host}) as response:
            assert response.status == status


async def test_weights_of_other_folders_and_forged_versions_are_refused(
    serve: Callable, folder: Path, new_weights: Path, tmp_path: Path
) -> None:
    root = tmp_path / "engines" / "engine-0"
    own = root / "publication-7"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes((new_weights / "model.safetensors").read_bytes())
    (root / "publication-8").symlink_to(new_weights)
    escaping = root / "publication-9"
    escaping.mkdir()
    (escaping / "model.safetensors").symlink_to(new_weights / "model.safetensors")
    client: Client = await serve(folder, update_source=UpdateSource(root, RUN))
    for path, version in (
        (new_weights, f"{RUN}:7:1"),
        (root / "publication-8", f"{RUN}:8:1"),
        (escaping, f"{RUN}:9:1"),
        (root / ".." / ".." / new_weights.name, f"{RUN}:7:1"),
        (own, None),
        (own, "forged"),
        (own, "other:7:1"),
        (own, f"{RUN}:8:1"),
    ):
        reply = await client.post("/update_weights_from_disk", {"model_path": str(path), "weight_version": version})
        assert (reply.status, reply.body["success"]) == (400, False), path
    assert (await client.get("/model_info")).body["weight_version"] == "default"
    reply = await client.post("/update_weights_from_disk", {"model_path": str(own), "weight_version": f"{RUN}:7:1"})
    assert reply.status == 200


@pytest.mark.parametrize("weight_map", [{"a": 1, "b": "x"}, {"a": ["x"]}, {"a": "../x"}, {"a": "/x"}, "x", 7, None])
async def test_a_wrong_weight_index_is_refused(client: Client, tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reply = await client.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert reply.status == 400


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
async def test_a_pipe_in_place_of_a_file_is_refused(client: Client, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    reply = await client.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert reply.status == 400
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    reply = await client.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert reply.status == 400
