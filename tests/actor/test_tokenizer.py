import json
from pathlib import Path

import pytest

from actor.chat.tokenizer import Tokenizer
from protocol.errors import DataError


def test_special_tokens_are_one_id_and_survive(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode("a<|im_end|>\n<|im_start|>user")
    assert ids.count(chat_tokenizer.eos_token_id) == 1
    assert chat_tokenizer.decode(ids) == "a<|im_end|>\n<|im_start|>user"


def test_truncation_drops_a_character_that_is_cut(chat_tokenizer: Tokenizer) -> None:
    text = "漢"  # three bytes, three tokens here
    assert len(chat_tokenizer.encode(text)) == 3
    assert chat_tokenizer.truncate("a" + text, 3) == "a"
    assert chat_tokenizer.truncate("a" + text, 4) == "a" + text


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, "tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": None}, "eos_token"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{}"}, "eos_token"),
        ({"tokenizer.json": None, "tokenizer_config.json": json.dumps({"eos_token": "<nope>"})}, "<nope>"),
    ],
)
def test_an_unusable_folder_is_refused(tmp_path: Path, toy_folder: Path, files: dict, word: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text((toy_folder / name).read_text() if text is None else text)
    with pytest.raises(DataError, match=word):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["toy_folder", "chat_folder"])
def test_ids_and_texts_equal_those_of_transformers(request: pytest.FixtureRequest, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder: Path = request.getfixturevalue(name)
    ours = Tokenizer.load(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=ours.eos_token)
    text = f"what is zuka founder ? <memory> none <think> the answer, and é 漢{ours.eos_token}"
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.eos_token_id == theirs.eos_token_id
