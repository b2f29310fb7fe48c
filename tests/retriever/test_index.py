from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from protocol.config_base import ExtensionSection
from protocol.errors import ConfigError, DataError
from retriever.build_index import build_index
from retriever.collection import open_collections, split_argument
from retriever.corpus import PassageTable
from retriever.encoders.base import Encoder
from retriever.encoders.bow import BagOfWordsEncoder
from retriever.extensions import create_encoder, encoder_section, reopen_encoder, structure_section
from retriever.index_folder import load_index

TEXTS = ["red apple .", "green pear .", "red pear tree ."]
WriteCorpus = Callable[[Path, Sequence[str]], Path]
BuildBowIndex = Callable[[Path, Path], Path]


@pytest.fixture
def section(model_folder: Path) -> ExtensionSection:
    return encoder_section(str(model_folder), {"max_tokens": 16})


@pytest.fixture
def encoder(section: ExtensionSection) -> Encoder:
    return create_encoder(section)


@pytest.fixture
def corpus(tmp_path: Path, write_corpus: WriteCorpus) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def model_index(tmp_path: Path, corpus: Path, section: ExtensionSection) -> Path:
    build_index(corpus=corpus, out=tmp_path / "model", encoder=section, structure=structure_section("hnsw", {"m": 8}))
    return tmp_path / "model"


def test_an_index_finds_its_passages_again(model_index: Path, encoder: Encoder) -> None:
    loaded = load_index(model_index)
    assert [passage.text for passage in loaded.passages] == TEXTS
    found = loaded.vectors.search(encoder.encode_passages(list(loaded.passages)), 1)
    assert found.rows[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    assert {path.name for path in model_index.iterdir()} == {*loaded.manifest.sha256, "manifest.json"}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_toy_world_s_document_is_among_the_first_three(
    seed: int,
    tmp_path: Path,
    write_corpus: WriteCorpus,
    build_bow_index: BuildBowIndex,
    toy_facts: Callable[[int], list[tuple[str, str, str]]],
) -> None:
    facts = toy_facts(seed)
    corpus = write_corpus(tmp_path / "c.jsonl", [f"{s} {r} {o} ." for s, r, o in facts])
    loaded = load_index(build_bow_index(corpus, tmp_path / "index"))
    encoder = BagOfWordsEncoder()
    encoder.load_state(tmp_path / "index")
    rows = loaded.vectors.search(encoder.encode_queries([f"{s} {r}" for s, r, _ in facts]), 3).rows
    gold = np.arange(len(facts))[:, None]
    assert (rows == gold).any(axis=1).mean() >= 0.999
    assert (rows[:, :1] == gold).mean() >= 0.85  # A mutual marriage has two documents, and either may come first.


def test_building_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path, section: ExtensionSection) -> None:
    a, b = (
        build_index(corpus=corpus, out=tmp_path / name, encoder=section, structure=structure_section("hnsw"))
        for name in "ab"
    )
    assert a == b


def test_force_replaces_an_index_but_no_other_folder(tmp_path: Path, corpus: Path) -> None:
    def build(out: Path, *, force: bool) -> None:
        bow, flat = encoder_section("bow"), structure_section("flat")
        build_index(corpus=corpus, out=out, encoder=bow, structure=flat, force=force)

    build(tmp_path / "index", force=False)
    with pytest.raises(DataError, match="exists; give another --out, or --force"):
        build(tmp_path / "index", force=False)
    build(tmp_path / "index", force=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="is not an index, so --force does not replace it"):
        build(tmp_path / "other", force=True)


def test_a_failed_build_leaves_the_old_index_and_no_temporary_files(bow_index: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "text": "x"}\n{"id": "b"}\n')
    before = load_index(bow_index).manifest
    with pytest.raises(DataError, match="line 2"):
        build_index(
            corpus=bad,
            out=bow_index,
            encoder=encoder_section("bow"),
            structure=structure_section("flat"),
            force=True,
        )
    assert load_index(bow_index).manifest == before
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl", "corpus.jsonl", "index"}


def change(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


def test_a_folder_that_disagrees_with_its_manifest_is_refused(bow_index: Path, model_index: Path) -> None:
    with pytest.raises(DataError, match=r"is not an index \(it has no manifest.json\)"):
        load_index(bow_index.parent)
    change(bow_index, num_passages=4)
    with pytest.raises(DataError, match="num_passages expected 4, found 3 vectors"):
        load_index(bow_index)
    change(bow_index, format_version=3)
    with pytest.raises(DataError, match="format_version must be 1 or 2, got 3"):
        load_index(bow_index)
    change(bow_index, format_version=2, metric="l2")
    with pytest.raises(DataError, match="metric: Input should be 'inner_product'"):
        load_index(bow_index)
    graph = model_index / "graph.hnsw"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=r"graph.hnsw: expected sha256 .*, found"):
        load_index(model_index)
    graph.unlink()
    with pytest.raises(DataError, match=r"cannot read graph.hnsw of index .*: No such file"):
        load_index(model_index)


def test_vectors_of_another_dimension_are_refused(bow_index: Path) -> None:
    manifest = json.loads((bow_index / "manifest.json").read_bytes())
    change(bow_index, encoder={**manifest["encoder"], "dimension": 9})
    with pytest.raises(DataError, match="expected float32 vectors of dimension 9, found float32"):
        load_index(bow_index)


def test_an_encoder_that_did_not_make_the_index_is_refused(model_index: Path, bow_index: Path) -> None:
    with pytest.raises(DataError, match="made with another encoder: expected bow, found minilm"):
        open_collections([str(bow_index)], encoder="minilm")
    with pytest.raises(DataError, match=r"made with another encoder: expected .*, found bow"):
        open_collections([str(model_index)], encoder="bow")
    spec = load_index(model_index).manifest.encoder
    with pytest.raises(DataError, match=r"fingerprint expected '0000.*' \(made with .*\), found"):
        reopen_encoder(spec.model_copy(update={"fingerprint": "0" * 64}), index_folder=model_index)
    with pytest.raises(DataError, match=r"dimension expected 64 .*, found 32"):
        reopen_encoder(spec.model_copy(update={"dimension": 64}), index_folder=model_index)
    reopened = reopen_encoder(spec, index_folder=model_index)
    assert (reopened.fingerprint, reopened.dimension) == (spec.fingerprint, spec.dimension)


def test_several_indexes_are_opened_by_name(bow_index: Path, model_index: Path) -> None:
    names = [collection.name for collection in open_collections([f"toy={bow_index}", str(model_index)])]
    assert names == ["toy", "model"]
    with pytest.raises(ConfigError, match=r"two indexes are called 'index': .*; write NAME="):
        open_collections([str(bow_index), str(bow_index)])
    assert split_argument("/a=b/c") == ("c", Path("/a=b/c"))


def as_version_1(folder: Path) -> None:
    """Rewrites the manifest of a bow or Hugging Face index as format version 1 wrote it."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    encoder, structure = tree["encoder"], tree.pop("structure")
    options = {"query_prefix": "", "passage_prefix": "", "pooling": None, "max_tokens": None, **encoder["options"]}
    source = options.pop("folder", encoder["use"])
    kind = "bow" if encoder["use"] == "bow" else "huggingface"
    known = {name: encoder[name] for name in ("fingerprint", "dimension")}
    tree |= {"format_version": 1, "encoder": {"kind": kind, "source": source, **known, **options}}
    path.write_text(json.dumps({**tree, "hnsw": structure["options"] or None}))


def test_indexes_of_format_version_1_are_read(bow_index: Path, model_index: Path) -> None:
    for folder in (bow_index, model_index):
        before = load_index(folder).manifest
        as_version_1(folder)
        assert load_index(folder).manifest == before
    assert [collection.name for collection in open_collections([str(bow_index), str(model_index)])] == [
        "index",
        "model",
    ]


def test_a_moved_model_folder_is_given_again(model_index: Path, model_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model_folder, moved)
    assert len(open_collections([str(model_index)], encoder=str(moved))) == 1
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    with pytest.raises(DataError, match="made with another encoder: fingerprint expected"):
        open_collections([str(model_index)], encoder=str(moved))


def save_vectors(path: Path, ids: Sequence[str], vectors: np.ndarray) -> Path:
    np.savez(path, ids=np.array(ids), vectors=vectors)
    return path


def test_ready_vectors_are_matched_by_id(
    tmp_path: Path, corpus: Path, section: ExtensionSection, encoder: Encoder, model_index: Path
) -> None:
    passages = PassageTable(model_index)
    vectors = encoder.encode_passages(list(passages))[::-1].astype(np.float16)
    ready = save_vectors(tmp_path / "v.npz", ["d2", "d1", "d0"], vectors)
    out = tmp_path / "ready"
    build_index(corpus=corpus, out=out, encoder=section, structure=structure_section("hnsw"), vectors=ready)
    found = load_index(out).vectors.search(encoder.encode_passages(list(passages)), 1)
    assert found.rows[:, 0].tolist() == [0, 1, 2]
    assert found.scores.min() > 0.999


def test_ready_vectors_of_other_passages_or_encoders_are_refused(
    tmp_path: Path, corpus: Path, section: ExtensionSection
) -> None:
    hnsw = structure_section("hnsw")
    vectors = np.eye(3, 32, dtype=np.float16)
    ids = ["d0", "d1", "d2"]
    cases = [
        (ids, vectors[:, :8], r"vectors expected shape \(3, 32\) .*, found \(3, 8\)"),
        (["d0", "d1", "x"], vectors, r"ids expected the corpus's 3, found 3, 1 passages without a vector \(first 'd2'"),
        (["d0", "d1", "d1"], vectors, "1 ids occur twice"),
        (ids, vectors * 0, "vector of passage 'd0' is not finite or zero"),
        (ids, vectors * np.nan, "vector of passage 'd0' is not finite or zero"),
        (ids, vectors, "expected cosine >= 0.98 with the vector that the encoder"),
    ]
    for number, (names, array, message) in enumerate(cases):
        path = save_vectors(tmp_path / f"{number}.npz", names, array)
        with pytest.raises(DataError, match=message):
            build_index(corpus=corpus, out=tmp_path / "o", encoder=section, structure=hnsw, vectors=path)
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "half.npz", ids=np.array(ids))
    np.save(tmp_path / "array.npy", vectors)
    for name in ("text.npz", "half.npz", "array.npy", "none.npz"):
        with pytest.raises(DataError, match=r"give an \.npz with arrays `ids` and `vectors`"):
            build_index(corpus=corpus, out=tmp_path / "o", encoder=section, structure=hnsw, vectors=tmp_path / name)
