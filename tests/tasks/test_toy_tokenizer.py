"""The toy's tokenizer as a library and as a Hugging Face folder."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from actor.tasks.toy.tokenizer import (
    END,
    PAD,
    UNKNOWN,
    build_tokenizer,
    syllable_ids,
    symbol_ids,
    vocabulary,
    write_tokenizer,
)
from actor.tasks.toy.world import RELATIONS, SYLLABLES

TOKENIZER = build_tokenizer()
TOKENS = vocabulary()
CONTEXT = (
    "<question> what is zuka founder birthplace ? <memory> none <think> zuka founder <search> zuka founder <end> "
    "<information> zuka founder kami . <memory> zuka founder kami <end>"
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([k for k, token in enumerate(TOKENS) if token != UNKNOWN]), max_size=40))
def test_decoded_ids_encode_to_themselves(ids: list[int]):
    assert TOKENIZER.encode(TOKENIZER.decode(ids, skip_special_tokens=False)).ids == ids


def test_the_vocabulary_has_98_tokens_and_names_its_ranges():
    assert len(TOKENS) == len(set(TOKENS)) == TOKENIZER.get_vocab_size() == 98
    assert tuple(TOKENS[k] for k in syllable_ids()) == SYLLABLES
    assert {"what", "is", "?", ".", "none", *RELATIONS, *SYLLABLES} == {TOKENS[k] for k in symbol_ids()}


def test_a_context_is_one_token_a_word_and_a_syllable():
    encoded = TOKENIZER.encode(CONTEXT)
    assert UNKNOWN not in encoded.tokens
    assert encoded.tokens[:6] == ["<question>", "what", "is", "zu", "ka", "founder"]
    assert TOKENIZER.decode(encoded.ids, skip_special_tokens=False) == CONTEXT


def test_words_that_begin_like_names_are_not_cut():
    assert TOKENIZER.encode("zukax").tokens == [UNKNOWN]
    assert TOKENIZER.encode("mayor leader").tokens == ["mayor", "leader"]


def test_the_folder_loads_as_a_tokenizer(tmp_path: Path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == (END, PAD, 98)
    assert loaded.encode(CONTEXT) == TOKENIZER.encode(CONTEXT).ids
    assert loaded.decode(loaded.encode(CONTEXT)) == CONTEXT
