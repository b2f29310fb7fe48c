"""A whole run in real processes, with SGLang as its engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from learner.store.audit import audit_run
from tests.launch.running import RUN_TIMEOUT_S, launched, steps
from tests.launch.tiny_run import make_tiny_run
from tests.sglang.server import API_KEY, Server

pytestmark = pytest.mark.sglang


def test_a_tiny_run_on_an_attached_server(server: Server, model: Path, tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(model / name, run.model / name)
    (tmp_path / "key").write_text(API_KEY)
    settings = {
        "engine.count": "0",
        "engine.urls": f'["{server.url}"]',
        "network.api_key_file": str(tmp_path / "key"),
        "learner.num_steps": "3",
    }
    log = tmp_path / "up.log"
    options = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    with launched("up", run.config, *options, log=log) as process:
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    audit = audit_run(run.run_dir)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_trained, audit.num_groups_lost, audit.num_publications) == (3, 6, 0, 4)
    assert audit.staleness_max <= 1
    assert steps(run.run_dir) == 3
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    worst = max(row["policy/kl_behavior"] for row in rows)
    print(f"mismatch KL <= {worst:.2g} nats per token")
