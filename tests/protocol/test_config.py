"""The run file: paths, overrides, and errors that name the key, the bound and the value."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from protocol.config_file import load_config, save_config
from protocol.errors import ConfigError, DataError

GOOD = '[model]\npath = "m"\n[task]\nuse = "toy"\nworlds = [1]\n'


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_relative_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    text = (
        '[run]\ndir = "out"\n[model]\npath = "../m"\n[task]\nquestions = ["q.jsonl", "/abs/q.jsonl"]\n'
        '[network]\nkeys = "k"\n[retriever.indexes]\na = "i"\n'
    )
    config = load_config(write(tmp_path, text))
    assert config.run.dir == tmp_path / "out"
    assert config.model.path == tmp_path / "../m"
    assert config.task.options == {"questions": [str(tmp_path / "q.jsonl"), "/abs/q.jsonl"]}
    assert config.network.keys == tmp_path / "k"
    assert config.retriever.indexes == {"a": tmp_path / "i"}


def test_relative_paths_in_overrides_are_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(tmp_path, GOOD)
    config = load_config(path, ["run.dir=out", 'task.eval_questions=["q"]', "network.keys=k"])
    assert config.run.dir == here / "out"
    assert config.task.options["eval_questions"] == [str(here / "q")]
    assert config.network.keys == here / "k"


@pytest.mark.parametrize("overrides", [[], ["run.dir=out"], ["model.path=other"]])
def test_a_saved_config_is_the_same_from_any_folder(
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
def test_an_override_sets_a_value(tmp_path: Path, override: str, expected: float) -> None:
    assert load_config(write(tmp_path, GOOD), [override]).learner.loss.options == {"clip_low": expected}


def test_a_bare_word_is_a_string(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["run.name=tuesday", 'learner.device="cuda:0"', "reward.use=f1"])
    assert (config.run.name, config.learner.device, config.reward.use) == ("tuesday", "cuda:0", "f1")
    assert load_config(write(tmp_path, GOOD), ["task.worlds=[4,5]"]).task.options["worlds"] == [4, 5]


@pytest.mark.parametrize("override", ["learner", "=3", "learner.=3", ".x=1", ""])
def test_an_override_without_key_or_value_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set must be section.key=value, got"):
        load_config(write(tmp_path, GOOD), [override])


def test_an_override_into_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use is a value, not a section"):
        load_config(write(tmp_path, GOOD), ["task.use.x=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[learner]\nclip = 1\n", "learner.clip: unknown key; known here: num_steps, groups_per_batch"),
        (
            "[learner.loss]\nclip = 1\n",
            "learner.loss.clip: unknown key; .*known here: clip_low, clip_high, dual_clip, use, corrections",
        ),
        ("[lerner]\n", "lerner: unknown key; did you mean 'learner'; known here: run, network, model"),
        ("[learner]\nnum_step = 1\n", "learner.num_step: unknown key; did you mean 'num_steps'; known here: "),
        ("[learner]\nstaleness_bound = -1\n", "learner.staleness_bound: must be >= 0, got -1"),
        ("[learner]\nnum_steps = 0\n", "learner.num_steps: must be >= 1, got 0"),
        ("[learner]\nlease_timeout_s = nan\n", "learner.lease_timeout_s: must be > 0, got nan"),
        ('[learner]\ndtype = "fp8"\n', "learner.dtype: must be one of 'float32' or 'bfloat16', got 'fp8'"),
        ("[learner.loss]\nminibatches = 1000\n", "minibatches must be <= groups_per_batch .* 128, got 1000"),
        ('[run]\nname = "a b"\n', "run.name: .*pattern.*, got 'a b'"),
        ("[network]\ncontrol_port = 70000\n", "network.control_port: must be <= 65535, got 70000"),
        ("[sampling]\ntop_p = 0.9\n", "sampling: top_p is refused: engines record log-probs of the whole distribution"),
        ("[sampling]\ntop_n = 9\n", "sampling.top_n: unknown key"),
        ("run = 3\n", "run: .*got 3"),
    ],
)
def test_an_error_names_the_key_the_bound_and_the_value(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text + GOOD)
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_only_the_model_must_be_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: model: must be set$"):
        load_config(write(tmp_path, ""))
    with pytest.raises(ConfigError, match=r"model\.path: must be set"):
        load_config(write(tmp_path, "[model]\n"))
    config = load_config(write(tmp_path, '[model]\npath = "m"\n'))
    assert (config.task.use, config.reward.use, config.workflow.use, config.tool) == ("qa", "em", "memsearcher", ())
    assert (config.learner.advantage.use, config.learner.loss.use) == ("grpo", "ppo")
    assert [correction.use for correction in config.learner.loss.corrections] == ["truncate"]


def test_base_dir_is_the_files_folder_unless_it_is_set(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD)).run.base_dir == tmp_path
    assert load_config(write(tmp_path, '[run]\nbase_dir = "sub"\n' + GOOD)).run.base_dir == tmp_path / "sub"


def test_keys_of_an_extension_are_kept_as_its_options(tmp_path: Path) -> None:
    text = (
        '[model]\npath = "m"\n'
        '[task]\nuse = "my.agent:Films"\nfile = "films.jsonl"\nnum = 3\n'
        '[workflow]\nuse = "my.agent:Notes"\ncontext_tokens = 100\ntools = ["search", "add"]\nmax_turns = 4\n'
        '[[tool]]\nuse = "search"\ntop_n = 2\n'
        '[[tool]]\nuse = "my.tools:Add"\nname = "add"\nbase = 10\n'
        '[learner.advantage]\nuse = "my.algorithm:Mine"\nalpha = 0.5\n'
        '[learner.loss]\nuse = "cispo"\nclip_high = 4.0\n'
        'corrections = [{use = "mask", high = 4.0}, {use = "my.algorithm:Cut", k = 3}]\n'
    )
    config = load_config(write(tmp_path, text))
    assert config.task.options == {"file": "films.jsonl", "num": 3}, "as written: the task resolves its paths"
    assert (config.workflow.context_tokens, config.workflow.tools) == (100, ("search", "add"))
    assert config.workflow.options == {"max_turns": 4}
    assert [(tool.lookup_name, tool.options) for tool in config.tool] == [
        ("search", {"top_n": 2}),
        ("add", {"base": 10}),
    ]
    assert config.learner.advantage.options == {"alpha": 0.5}
    assert config.learner.loss.options == {"clip_high": 4.0}
    assert [correction.options for correction in config.learner.loss.corrections] == [{"high": 4.0}, {"k": 3}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[tool]]\nuse = "search"\n[[tool]]\nuse = "search"\n', "tool: two tools have the name 'search'; give one"),
        (
            '[[tool]]\nuse = "my.tools:Add"\n',
            r"tool\[0\]: name must be set for a tool .* an import path \(my\.tools:Add\)",
        ),
        ('[[tool]]\nuse = "search"\nname = "a b"\n', r"tool\[0\]\.name: .*, got 'a b'"),
        ("[[tool]]\ntop_n = 3\n", r"tool\[0\]\.use: must be set"),
        (
            '[reward]\nuse = "my agent"\n',
            r"reward\.use: must be a built-in name or an import path package\.module:Name",
        ),
        ('[reward]\nuse = "a:b:c"\n', r"reward\.use: must be a built-in name or an import path package\.module:Name"),
        ("[workflow]\ncontext_tokens = 1\n", r"workflow\.context_tokens: must be >= 2, got 1"),
    ],
)
def test_a_section_of_an_extension_is_checked_without_loading_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, GOOD + text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[learner.advantage]\nuse = "grop"\n',
            "learner.advantage.use: there is no built-in 'grop'; did you mean 'grpo'",
        ),
        ('[learner.loss]\nuse = "cisp"\n', "learner.loss.use: there is no built-in 'cisp'; did you mean 'cispo'"),
        (
            "[learner.advantage]\nep = 1.0\n",
            "learner.advantage.ep: unknown key; did you mean 'eps'; known here: normalize_",
        ),
        ("[learner.advantage]\neps = 0.0\n", "learner.advantage.eps: must be > 0, got 0.0"),
        ("[learner.loss]\nclip_low = 1.5\n", "learner.loss.clip_low: must be <= 1, got 1.5"),
    ],
)
def test_options_of_built_in_algorithms_are_checked(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(write(tmp_path, GOOD + text))
    assert str(refused.value).startswith(f"{tmp_path / 'run.toml'}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.toml", b"[run"), ("run.toml", b"\xff\xfe"), ("run.json", b"{"), ("run.json", b"\xff\xfe")],
)
def test_a_file_that_is_not_toml_or_json_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"config {path} is not valid"):
        load_config(path)


@pytest.mark.parametrize("tree", [[], 3, "text", None])
def test_json_that_is_not_an_object_is_refused(tmp_path: Path, tree: object) -> None:
    for overrides in ([], ["run.name=x"]):
        with pytest.raises((ConfigError, DataError), match=r"run.json"):
            load_config(write(tmp_path, json.dumps(tree), "run.json"), overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "learner.loss.corrections=[{use='mask', low=6.0}]",
            ["learner.loss.corrections[0]: low must be <= high = 5.0, got 6.0"],
        ),
        (
            "learner.loss.corrections=[{use='truncate', low=1}]",
            ["learner.loss.corrections[0].low: unknown key", "known here: scope, ratio, high, use"],
        ),
        (
            "learner.loss.corrections=[{use='mask'}, {use='clamp'}]",
            ["learner.loss.corrections[1].use", "'clamp'", "built-in: truncate, mask, reject"],
        ),
        ("learner.loss.corrections=[{high=1.0}]", ["learner.loss.corrections[0].use: must be set"]),
        (
            "learner.loss.corrections=[{use='truncate', high=inf}]",
            ["learner.loss.corrections[0].high", "finite", "inf"],
        ),
        ("learner.loss={use='cispo', dual_clip=3.0}", ["learner.loss.dual_clip: unknown key"]),
        ("learner.loss.dual_clip=1.0", ["learner.loss.dual_clip: must be > 1, got 1.0"]),
        ("learner={advantage={use='maxrl'}, loss={kl_in='reward', kl_coefficient=0.1}}", ["learner.loss.kl_in"]),
        (
            "learner.loss={kl_in='reward', kl_coefficient=0.1}",
            ["learner.loss.kl_in must be 'loss' with learner.advantage.use = 'grpo' and normalize_std", "got 'reward'"],
        ),
        (
            "learner.group_size=1",
            ["learner.group_size must be >= 2 with learner.advantage.use = 'grpo'", "always 0, got 1"],
        ),
        ("learner={advantage={use='rloo'}, group_size=1}", ["learner.group_size must be >= 2", "'rloo'"]),
        ("learner={advantage={use='maxrl'}, group_size=1}", ["learner.group_size must be >= 2", "'maxrl'"]),
        ("learner.loss.kl_estimator=k4", ["learner.loss.kl_estimator", "k4"]),
        ("learner={advantage={use='gae'}, skip_zero_variance=true}", ["skip_zero_variance must be false", "got true"]),
        (
            "learner={advantage={use='my.algorithm:Mine'}, skip_zero_variance=true}",
            ["skip_zero_variance must be false", "got true"],
        ),
        ("learner.optimizer.betas=[0.9,1.0]", ["learner.optimizer.betas[1]: must be < 1, got 1.0"]),
    ],
)
def test_values_that_do_not_fit_together_are_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD), [override])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "override",
    [
        "learner={advantage={normalize_std=false}, loss={kl_in='reward', kl_coefficient=0.1}}",
        "learner={advantage={use='rloo'}, loss={kl_in='reward', kl_coefficient=0.1}}",
        "learner.loss.kl_in=reward",
        "learner={advantage={use='reinforce_pp'}, group_size=1}",
        "learner={advantage={use='gae'}, group_size=1}",
        "learner={advantage={use='my.algorithm:Mine'}, group_size=1}",
        "learner={advantage={context_rewards='add'}, group_size=1}",
    ],
)
def test_values_that_look_alike_and_fit_together_are_accepted(tmp_path: Path, override: str) -> None:
    load_config(write(tmp_path, GOOD), [override])
