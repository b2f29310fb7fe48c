"""Scripted episodes of the toy task, played by the workflow that training uses."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file

from actor.chat.tokenizer import Tokenizer
from actor.tasks.toy.command import main
from actor.tasks.toy.demonstrations import Demonstration, Noise, demonstrate, write_demonstrations
from actor.tasks.toy.tokenizer import syllable_ids, write_tokenizer
from protocol.types import Context, Status

SILENT = Noise(answer_early=0, wrong_relation=0, wrong_entity=0, stale_memory=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


async def play(tokenizer: Tokenizer, *worlds: int, num: int, noise: Noise | None = None) -> list[Demonstration]:
    played = demonstrate(
        worlds,
        tokenizer=tokenizer,
        num_episodes=num,
        seed=0,
        noise=noise,
    )
    return [each async for each in played]


def written(tokenizer: Tokenizer, context: Context) -> list[str]:
    """Returns the texts that the policy wrote in a context."""
    sampled = tokenizer.decode(context.token_ids[context.loss_mask].tolist())
    return [piece.strip() for piece in sampled.split("<end>")[:-1]]


async def test_without_noise_every_question_is_answered_in_hops_plus_one_turns(tokenizer: Tokenizer):
    for played in await play(tokenizer, 1, num=60, noise=SILENT):
        assert (played.episode.status, played.episode.answer) == (Status.COMPLETED, played.walk.answer)
        assert len(played.contexts) == len(played.walk.facts) + 1


async def test_with_noise_about_half_are_answered_right(tokenizer: Tokenizer):
    played = await play(tokenizer, 1, 2, 3, 4, num=4000)
    share = np.mean([each.episode.answer == each.walk.answer for each in played])
    assert 0.50 <= share <= 0.52
    assert max(len(each.contexts) for each in played) == 5
    assert {each.episode.status for each in played} == {Status.COMPLETED, Status.OVER_BUDGET}


async def test_the_last_context_is_an_answer_or_a_search_and_all_others_end_in_a_memory(tokenizer: Tokenizer):
    for played in await play(tokenizer, 1, num=200):
        pieces = [written(tokenizer, context) for context in played.contexts]
        assert [len(each) for each in pieces] == [2] * (len(pieces) - 1) + [1]
        assert [memory for _, memory in pieces[:-1]] == list(played.episode.memories)
        assert ("<answer>" in pieces[-1][0]) == (played.episode.answer is not None)
        assert all("<search>" in action for action, _ in pieces[:-1])


async def test_thoughts_and_memories_copy_words_of_the_context(tokenizer: Tokenizer):
    for played in await play(tokenizer, 1, num=100):
        for context in played.contexts:
            text, pieces = tokenizer.decode(context.token_ids.tolist()), written(tokenizer, context)
            prompt, _, rest = text.partition("<think>")
            thought = pieces[0].split(" <")[0]
            assert thought.split()[0] in prompt.split()
            for memory in pieces[1:]:
                assert f" {memory} " in rest.split("<information>")[1].split("<memory>")[0] or f" {memory} " in prompt


async def test_the_file_has_the_contexts_that_were_played(tmp_path: Path, tokenizer: Tokenizer):
    played = await play(tokenizer, 1, num=20)
    contexts = [context for each in played for context in each.contexts]
    path = tmp_path / "file.safetensors"

    def write() -> float:
        return write_demonstrations(path, [1], tokenizer=tokenizer, num_episodes=20, seed=0)

    share = await asyncio.to_thread(write)
    assert share == np.mean([each.episode.answer == each.walk.answer for each in played])
    arrays = load_file(path)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "token_ids": "int32",
        "loss_mask": "bool",
        "offsets": "int64",
    }
    np.testing.assert_array_equal(arrays["token_ids"], np.concatenate([c.token_ids for c in contexts]))
    np.testing.assert_array_equal(arrays["loss_mask"], np.concatenate([c.loss_mask for c in contexts]))
    np.testing.assert_array_equal(arrays["offsets"], np.cumsum([0, *map(len, contexts)]))
    with safe_open(path, framework="np") as file:
        assert file.metadata()["permutable"] == f"{syllable_ids().start}:{syllable_ids().stop}"


@pytest.mark.parametrize("eval_world", [[], ["--eval-world", "9"]])
def test_the_command_prepares_a_folder(tmp_path: Path, eval_world: list[str]):
    arguments = ["--out", str(tmp_path), "--world", "0", "--world", "1", "--episodes", "5", *eval_world]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    assert len(list((tmp_path / "corpora").glob("world-*.jsonl"))) == (3 if eval_world else 2)
