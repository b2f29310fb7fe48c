"""One TOML a run: what is wrong in it is named by its path, its bound and its value."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from protocol.config_file import load_config, save_config
from protocol.errors import ConfigError, DataError

GOOD = '[model]\npath = "m"\n[task]\nkind = "toy"\nworlds = [1]\n'


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_relative_paths_are_of_the_file(tmp_path: Path) -> None:
    text = (
        '[run]\ndir = "out"\n[model]\npath = "../m"\n[task]\nquestions = ["q.jsonl", "/abs/q.jsonl"]\n'
        '[network]\nkeys = "k"\n[retriever.indexes]\na = "i"\n'
    )
    config = load_config(write(tmp_path, text))
    assert config.run.dir == tmp_path / "out"
    assert config.model.path == tmp_path / "../m"
    assert config.task.questions == (tmp_path / "q.jsonl", Path("/abs/q.jsonl"))
    assert config.network.keys == tmp_path / "k"
    assert config.retriever.indexes == {"a": tmp_path / "i"}


def test_relative_paths_in_overrides_are_of_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(tmp_path, GOOD)
    config = load_config(path, ["run.dir=out", 'task.eval_questions=["q"]', "network.keys=k"])
    assert config.run.dir == here / "out"
    assert config.task.eval_questions == (here / "q",)
    assert config.network.keys == here / "k"


@pytest.mark.parametrize("overrides", [[], ["run.dir=out"], ["model.path=other"]])
def test_what_is_saved_reads_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """Roles read RUN/config.json, which lies in another folder than the file and the shell that it came from."""
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path, GOOD), overrides)
    saved = config.run.dir / "config.json"
    save_config(config, saved)
    monkeypatch.chdir("/")
    assert load_config(saved) == config
    assert os.listdir(saved.parent) == ["config.json"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.loss.clip_low=0.3", 0.3),
        ("learner.loss.clip_low = 0.3", 0.3),
        ("learner.loss={clip_low = 0.3}", 0.3),
    ],
)
def test_overrides(tmp_path: Path, override: str, expected: float) -> None:
    assert load_config(write(tmp_path, GOOD), [override]).learner.loss.clip_low == expected


def test_a_bare_word_is_a_string(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["run.name=tuesday", 'learner.device="cuda:0"', "task.reward=f1"])
    assert (config.run.name, config.learner.device, config.task.reward) == ("tuesday", "cuda:0", "f1")
    assert load_config(write(tmp_path, GOOD), ["task.worlds=[4,5]"]).task.worlds == (4, 5)


@pytest.mark.parametrize("override", ["learner", "=3", "learner.=3", ".x=1", ""])
def test_overrides_of_no_form(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set must be section.key=value, got"):
        load_config(write(tmp_path, GOOD), [override])


def test_overrides_into_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind is a value, not a section"):
        load_config(write(tmp_path, GOOD), ["task.kind.x=1"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[learner]\nclip = 1\n", "learner.clip: unknown key; known here: num_steps, groups_per_batch"),
        ("[learner.loss]\nclip = 1\n", "learner.loss.clip: unknown key; known here: policy_loss, clip_low"),
        ("[lerner]\n", "lerner: unknown key; known here: run, network, model"),
        ("[learner]\nstaleness_bound = -1\n", "learner.staleness_bound: .*greater than or equal to 0, got -1"),
        ("[learner]\nnum_steps = 0\n", "learner.num_steps: .*greater than or equal to 1, got 0"),
        ("[learner]\nlease_timeout_s = nan\n", "learner.lease_timeout_s: .*greater than 0, got nan"),
        ('[learner]\ndtype = "fp8"\n', "learner.dtype: Input should be 'float32' or 'bfloat16', got 'fp8'"),
        ("[learner.loss]\nminibatches = 1000\n", "minibatches must be <= groups_per_batch .* 128, got 1000"),
        ('[run]\nname = "a b"\n', "run.name: .*pattern.*, got 'a b'"),
        ("[network]\ncontrol_port = 70000\n", "network.control_port: .*65535, got 70000"),
        ("[sampling]\ntop_p = 0.9\n", "sampling: top_p is refused: a truncating sampler's log-probs"),
        ("[sampling]\ntop_n = 9\n", "sampling.top_n: unknown key"),
        ("run = 3\n", "run: .*got 3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text + GOOD)
    with pytest.raises(ConfigError, match=says) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_what_must_be_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: must be set; task: must be set"):
        load_config(write(tmp_path, ""))
    with pytest.raises(ConfigError, match=r"task.questions must name at least one JSONL file"):
        load_config(write(tmp_path, '[model]\npath = "m"\n[task]\nkind = "qa"\n'))


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.toml", b"[run"), ("run.toml", b"\xff\xfe"), ("run.json", b"{"), ("run.json", b"\xff\xfe")],
)
def test_files_that_are_not_of_their_kind(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"config {path} is not valid"):
        load_config(path)


@pytest.mark.parametrize("tree", [[], 3, "text", None])
def test_json_that_is_no_table(tmp_path: Path, tree: object) -> None:
    for overrides in ([], ["run.name=x"]):
        with pytest.raises((ConfigError, DataError), match=r"run.json"):
            load_config(write(tmp_path, json.dumps(tree), "run.json"), overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("workflow.top_n=101", ["workflow.top_n", "100"]),
        ("workflow.context_tokens=1536", ["workflow.context_tokens = 1536", "512 + 1024"]),
        ("learner.loss.corrections=[{kind='mask', low=6.0}]", ["corrections.0.mask: low must be <= high = 5.0", "6.0"]),
        ("learner.loss.corrections=[{kind='truncate', low=1}]", ["corrections.0.truncate.low: unknown key"]),
        ("learner.loss.corrections=[{kind='clamp'}]", ["learner.loss.corrections.0", "'truncate'", "'clamp'"]),
        ("learner.loss.corrections=[{kind='truncate', high=inf}]", ["corrections.0.truncate.high", "finite", "inf"]),
        ("learner.loss={policy_loss='cispo', dual_clip=3.0}", ["dual_clip must not be set", "'cispo', got 3.0"]),
        ("learner.loss.dual_clip=1.0", ["learner.loss.dual_clip", "greater than 1"]),
        ("learner={advantage={estimator='maxrl'}, loss={kl_in='reward', kl_coefficient=0.1}}", ["learner.loss.kl_in"]),
        (
            "learner={advantage={estimator='gae'}, skip_zero_variance=true}",
            ["skip_zero_variance must be false"],
        ),
        ("learner.optimizer.betas=[0.9,1.0]", ["learner.optimizer.betas", "less than 1"]),
    ],
)
def test_budgets_that_cannot_hold_are_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD), [override])
    assert all(word in str(caught.value) for word in words), caught.value
