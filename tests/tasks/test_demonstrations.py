"""Scripted episodes, judged by the parsers that judge the policy."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file

from actor.tasks.toy.command import main
from actor.tasks.toy.demonstrations import Noise, demonstrate, write_demonstrations
from actor.tasks.toy.tokenizer import build_tokenizer, syllable_ids
from actor.tasks.toy.world import make_world
from actor.workflows.rendering import Answer, Searches
from actor.workflows.toy import ToyRendering

RENDERING = ToyRendering()
SILENT = Noise(answer_early=0, wrong_relation=0, wrong_entity=0, stale_memory=0)


def test_without_noise_every_question_is_answered_in_hops_plus_one_turns():
    for walk, episode in demonstrate([make_world(1)], rendering=RENDERING, num_episodes=60, seed=0, noise=SILENT):
        assert episode.answer == walk.answer
        assert len(episode.contexts) == len(walk.facts) + 1


def test_with_noise_about_half_are_answered_right():
    played = list(demonstrate([make_world(1), make_world(2)], rendering=RENDERING, num_episodes=1500, seed=0))
    share = np.mean([episode.answer == walk.answer for walk, episode in played])
    assert 0.45 < share < 0.6
    assert max(len(episode.contexts) for _, episode in played) == 5


def test_the_workflow_can_read_all_that_is_written():
    for _, episode in demonstrate([make_world(1)], rendering=RENDERING, num_episodes=200, seed=3):
        for context in episode.contexts:
            written = [piece.text for piece in context if piece.sampled]
            action = RENDERING.parse_action(written[0])
            if isinstance(action, Answer):
                assert (context, action.text) == (episode.contexts[-1], episode.answer)
            else:
                assert isinstance(action, Searches)
                assert len(written) == 2 or (context is episode.contexts[-1] and episode.answer is None)
            if len(written) == 2:
                assert RENDERING.parse_memory(written[1])
                assert f"{written[0].split(' <search> ')[0]} " in f"{context[0].text} {written[0]} "


def test_the_next_context_carries_the_memory_and_nothing_else():
    for _, episode in demonstrate([make_world(1)], rendering=RENDERING, num_episodes=50, seed=4):
        for before, after in zip(episode.contexts, episode.contexts[1:], strict=False):
            memory = RENDERING.parse_memory(before[3].text)
            assert f"<memory> {memory} <think>" in after[0].text


def test_the_file_marks_exactly_what_the_policy_wrote(tmp_path: Path):
    path = tmp_path / "demonstrations.safetensors"
    worlds = [make_world(1)]
    share = write_demonstrations(path, worlds, rendering=RENDERING, num_episodes=20, seed=0)
    played = list(demonstrate(worlds, rendering=RENDERING, num_episodes=20, seed=0))
    assert share == np.mean([episode.answer == walk.answer for walk, episode in played])
    arrays = load_file(path)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "token_ids": "int32",
        "loss_mask": "bool",
        "offsets": "int64",
    }
    contexts = [context for _, episode in played for context in episode.contexts]
    assert len(arrays["offsets"]) == len(contexts) + 1
    tokenizer = build_tokenizer()
    for k, context in enumerate(contexts):
        span = slice(arrays["offsets"][k], arrays["offsets"][k + 1])
        ids, mask = arrays["token_ids"][span], arrays["loss_mask"][span]
        whole = " ".join(piece.text for piece in context)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == whole
        sampled = " ".join(piece.text for piece in context if piece.sampled)
        assert tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False) == sampled
    with safe_open(path, framework="np") as file:
        assert file.metadata()["permutable"] == f"{syllable_ids().start}:{syllable_ids().stop}"


@pytest.mark.parametrize("eval_world", [[], ["--eval-world", "9"]])
def test_the_command_prepares_a_folder(tmp_path: Path, eval_world: list[str]):
    arguments = ["--out", str(tmp_path), "--world", "0", "--world", "1", "--episodes", "5", *eval_world]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    assert len(list((tmp_path / "corpora").glob("world-*.jsonl"))) == (3 if eval_world else 2)
