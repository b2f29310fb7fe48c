"""The TOML in the documents is valid; the run files of docs/start.md pass `palimpsest check` as far as a CPU allows."""

# pyright: reportMissingImports=false
# The modules of examples/wiki_pool are on sys.path only while its scripts and these tests run.

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from learner.launch.pointless_settings import pointless_settings
from learner.launch.process_plan import plan, with_ports
from protocol.check_result import CheckResult
from protocol.config_file import load_config
from tests.docs.test_links import DOCUMENTS, ROOT, read

TIMEOUT_S = 120.0
FRAGMENT = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN_FILES: dict[str, str] = dict(
    re.findall(r"^```toml file=(\S+)\n(.*?)^```", read(ROOT / "docs" / "start.md"), re.MULTILINE | re.DOTALL)
)
# What every config needs, for fragments of one.
REST = '[model]\npath = "model"\n[task]\nquestions = ["q.jsonl"]\n'
SERVERS = {f"http://127.0.0.1:{port}" for port in range(30000, 30004)}


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if FRAGMENT.search(read(ROOT / each))])
def test_fragments_are_valid_in_a_run_file(document: str, tmp_path: Path) -> None:
    for text in FRAGMENT.findall(read(ROOT / document)):
        sections = tomllib.loads(text).keys()
        rest = "".join(
            part for part in re.split(r"(?m)^(?=\[)", REST) if part and part[1:].split("]")[0] not in sections
        )
        (tmp_path / "run.toml").write_text(rest + text)
        load_config(tmp_path / "run.toml")


def test_own_model_starts_every_role(tmp_path: Path) -> None:
    config = load_config(written("own-model.toml", tmp_path))
    assert not list(pointless_settings(config))
    roles = [process.role for process in plan(with_ports(config), config_path=tmp_path / "config.json")]
    assert roles == ["learner", "retriever", "engine", "actor"]


def test_gpu_node_attaches_to_its_servers(tmp_path: Path) -> None:
    config = load_config(written("gpu-node.toml", tmp_path))
    assert not list(pointless_settings(config))
    processes = plan(with_ports(config), config_path=tmp_path / "config.json")
    assert [process.role for process in processes] == ["learner", "retriever", *["agent"] * 4, *["actor"] * 4]
    assert {process.argv[-1] for process in processes if process.role == "agent"} == SERVERS


def test_two_nodes_starts_only_learner_and_retriever(tmp_path: Path) -> None:
    config = load_config(written("two-nodes.toml", tmp_path))
    assert {key for key, _ in pointless_settings(config)} == {"actor.count", "engine.count"}
    roles = [process.role for process in plan(config, config_path=tmp_path / "config.json")]
    assert roles == ["learner", "retriever"], "every port that a node must know is set"


@pytest.mark.slow
def test_run_files_pass_the_check_of_a_machine_without_gpus(tmp_path: Path) -> None:
    """With a tiny model, one question and one passage. The commands of the page make index, keys and token."""
    make_inputs(tmp_path)
    palimpsest("index", "corpus.jsonl", "--out", "index", "--encoder", "bow", cwd=tmp_path)
    palimpsest("keys", "keys", cwd=tmp_path)
    (tmp_path / "token").write_text("a-token\n")
    (tmp_path / "token").chmod(0o600)
    few = {"task"}  # one question is fewer than a batch has groups
    # The tiny model has 2,048 positions.
    small = [f"--set={each}" for each in ("learner.device=cpu", "learner.ranks=1", "workflow.context_tokens=2000")]

    own = check("own-model.toml", cwd=tmp_path)
    assert (outcomes(own, "fail"), outcomes(own, "warn")) == (set(), few), own
    node = check("gpu-node.toml", *small, cwd=tmp_path)
    assert (outcomes(node, "fail"), outcomes(node, "warn")) == (set(), {*few, "engine.urls"}), node
    assert {each.message.split()[0] for each in node if each.subject == "engine.urls"} == SERVERS
    two = check("two-nodes.toml", *small, "--set=network.host=127.0.0.1", cwd=tmp_path)
    assert (outcomes(two, "fail"), outcomes(two, "warn")) == (set(), {*few, "actor.count", "engine.count"}), two


def written(name: str, folder: Path) -> Path:
    (folder / name).write_text(RUN_FILES[name])
    return folder / name


def make_inputs(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples" / "wiki_pool"))
    try:
        from bpe import train_tokenizer
        from fit import build_model, save_model
    finally:
        sys.path.remove(str(ROOT / "examples" / "wiki_pool"))
    tokenizer = train_tokenizer(["A small corpus."] * 3, vocab_size=2000, top_n=2)
    save_model(build_model(tokenizer, seed=0), tokenizer, folder / "model")
    row = {"id": "q1", "question": "Who wrote it?", "answers": ["Ann"]}
    for name in ("questions.jsonl", "questions_eval.jsonl"):
        (folder / name).write_text(json.dumps(row) + "\n")
    (folder / "corpus.jsonl").write_text(json.dumps({"id": "p1", "title": "It", "text": "Ann wrote it."}) + "\n")


def palimpsest(*arguments: str, cwd: Path) -> str:
    command = [str(Path(sys.executable).with_name("palimpsest")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode in (0, 2), done.stderr
    return done.stdout


def check(name: str, *overrides: str, cwd: Path) -> list[CheckResult]:
    lines = palimpsest("check", str(written(name, cwd)), *overrides, cwd=cwd).splitlines()
    return [result for line in lines if (result := CheckResult.parse(line)) is not None]


def outcomes(results: list[CheckResult], outcome: str) -> set[str]:
    return {each.subject for each in results if each.outcome == outcome}
