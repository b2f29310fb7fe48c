"""What may change when a run is resumed: every change is made, then the run's store is claimed again."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from learner.store.resume_key import resume_key, run_facts
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.config import Config
from protocol.config_file import load_config
from protocol.errors import DataError
from protocol.run_identity import LEARNER_MAY_DIFFER, MAY_DIFFER
from tests.protocol.run_files import FILE_CHANGES, RunFiles, make_run_files

Change = Callable[[RunFiles], None]


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return make_run_files(tmp_path / "first")


def claim(config: Config) -> None:
    config.run.dir.mkdir(exist_ok=True)
    with closing(Store(RunFolder(config.run.dir).store)) as store:
        store.claim(resume_key(config))


def refusal(files: RunFiles, *overrides: str) -> str:
    """Claims a new run's store, then with the changed config or files. Returns the error."""
    with pytest.raises(DataError) as caught:
        claim(load_config(files.config, overrides))
    return str(caught.value)


RESUME_FILE_CHANGES = {**FILE_CHANGES, "reference": ("reference/model.safetensors", "learner.reference")}


@pytest.mark.parametrize(("name", "key"), RESUME_FILE_CHANGES.values(), ids=RESUME_FILE_CHANGES)
def test_one_changed_byte_of_a_file_is_refused(files: RunFiles, name: str, key: str) -> None:
    claim(load_config(files.config))
    files.change(name)
    message = refusal(files)
    assert f"{key}: the content differs between the run and this config" in message
    assert message.endswith("to resume, undo the change; to start a new run, choose another run.dir")


CONFIG_CHANGES: dict[str, str] = {
    "run.name": "other",
    "run.seed": "7",
    "task.use": "own.task:Task",
    "reward.use": "em",
    "workflow.max_turns": "9",
    "workflow.context_tokens": "64",
    "sampling.temperature": "0.6",
    "learner.group_size": "4",
    "learner.groups_per_batch": "3",
    "learner.staleness_bound": "1",
    "learner.loss.aggregation": "token",
    "learner.loss.clip_low": "0.1",
    "learner.advantage.use": "rloo",
    "learner.optimizer.learning_rate": "0.5",
    "learner.ablation": "last-context",
    "learner.check_drift": "true",
    "learner.dtype": "bfloat16",
    "learner.lora.rank": "4",
}


@pytest.mark.parametrize(("key", "value"), CONFIG_CHANGES.items(), ids=CONFIG_CHANGES)
def test_a_changed_key_is_refused(files: RunFiles, key: str, value: str) -> None:
    claim(load_config(files.config))
    assert f"{key}: the run has " in refusal(files, f"{key}={value}")


def test_another_reference_or_index_is_refused(files: RunFiles) -> None:
    claim(load_config(files.config))
    shutil.copytree(files.folder / "model", files.folder / "other")
    (files.folder / "other/model.safetensors").write_bytes(b"other")
    assert "learner.reference: " in refusal(files, f"learner.reference={files.folder / 'other'}")
    assert "model.weights: " in refusal(files, f"model.path={files.folder / 'other'}")
    assert "retriever.indexes.more: " in refusal(files, f"retriever.indexes.more={files.folder / 'index'}")


HOST_CHANGES = {
    "network.control_port": "1234",
    "network.host": "localhost",
    "actor.count": "7",
    "actor.max_trajectories": "3",
    "actor.search_timeout_s": "1.5",
    "engine.max_total_tokens": "99",
    "engine.torch_threads": "2",
    "retriever.port": "1235",
    "retriever.threads": "3",
    "learner.torch_threads": "4",
    "learner.tokens_per_micro_batch": "5",
    "learner.lease_timeout_s": "3.0",
    "learner.num_steps": "999",
    "learner.checkpoint.every_steps": "3",
    "learner.retention.keep_steps": "3",
    "learner.device": "cuda",
}


@pytest.mark.parametrize(("key", "value"), HOST_CHANGES.items(), ids=HOST_CHANGES)
def test_placement_speed_and_length_may_change(files: RunFiles, key: str, value: str) -> None:
    claim(load_config(files.config))
    claim(load_config(files.config, [f"{key}={value}"]))


def test_the_same_files_in_another_folder_are_accepted(files: RunFiles) -> None:
    claim(load_config(files.config))
    moved = files.folder.parent / "moved"
    files.folder.rename(moved)
    claim(load_config(moved / "run.toml"))


def test_num_steps_may_not_change_if_the_schedule_depends_on_it(files: RunFiles) -> None:
    linear = "learner.optimizer.schedule=linear"
    claim(load_config(files.config, [linear, "learner.num_steps=5"]))
    assert "learner.num_steps: the run has 5, this config has 9" in refusal(files, linear, "learner.num_steps=9")


def leaf_keys(tree: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_of_the_config_counts_unless_it_is_listed(files: RunFiles) -> None:
    """A key that is added to the config fails this test only if it is neither stored nor in a list of exceptions."""
    config = load_config(files.config)
    stored = resume_key(config)
    by_content = {"model.path", "retriever.indexes"}
    for key in leaf_keys(config.model_dump(mode="json", exclude={"tool"})):
        parts = key.split(".")
        listed = {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & (MAY_DIFFER | LEARNER_MAY_DIFFER)
        if listed or key == "learner.num_steps" or any(key.startswith(each) for each in by_content):
            continue
        assert f'"{parts[-1]}"' in stored[parts[0]], key


def test_the_lists_of_exceptions_name_keys_that_exist() -> None:
    for key in MAY_DIFFER | LEARNER_MAY_DIFFER:
        fields = Config.model_fields
        for part in key.split("."):
            assert part in fields, key
            fields = getattr(fields[part].annotation, "model_fields", {})


def test_a_store_of_an_earlier_version_is_readable_but_not_resumed(files: RunFiles) -> None:
    config = load_config(files.config)
    old = {"run_id": "r", "groups_per_batch": "2", "group_size": "2", "staleness_bound": "1", "ablation": "none"}
    config.run.dir.mkdir()
    with closing(Store(RunFolder(config.run.dir).store)) as store:
        store.claim(old)
        assert run_facts(store.meta()).groups_per_batch == 2
    assert "an earlier version of Palimpsest made it, which did not record learner, model, " in refusal(files)


def test_the_facts_for_the_audit_are_read_from_the_resume_key(files: RunFiles) -> None:
    facts = run_facts(resume_key(load_config(files.config, ["learner.ablation=last-context"])))
    given = tomllib.loads(files.config.read_text())["learner"]
    assert (facts.run_id, facts.groups_per_batch, facts.last_context_only) == ("r", given["groups_per_batch"], True)
