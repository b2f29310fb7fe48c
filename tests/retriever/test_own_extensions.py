"""A user's own encoder and index structure: the example of docs/retriever.md, in a package outside the repository."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.errors import ConfigError, DataError
from protocol.request_client import RequestClient
from protocol.search_messages import SearchReply, SearchRequest
from protocol.transport import Transport
from retriever.build_index import build_index
from retriever.collection import open_collections
from retriever.extensions import encoder_section, parse_options, structure_section
from retriever.index_folder import load_index

DOC = Path(__file__).resolve().parents[2] / "docs" / "retriever.md"
TIMEOUT_S = 60.0
TEXTS = ["red apple .", "green pear .", "red pear tree ."]
OWN_ENCODER, OWN_STRUCTURE = "my_retrieval:Trigrams", "my_retrieval:Float16Index"
Palimpsest = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds my_retrieval.py as docs/retriever.md shows it."""
    (block,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "my_retrieval.py").write_text(block, encoding="utf-8")
    return folder


@pytest.fixture
def importable(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, importable in this process for one test."""
    monkeypatch.syspath_prepend(package)
    for name in ("my_retrieval", "faulty"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return package


@pytest.fixture
def corpus(tmp_path: Path, write_corpus: Callable[[Path, list[str]], Path]) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


def palimpsest(*arguments: str | Path, package: Path) -> subprocess.Popen[str]:
    """Starts the real command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "learner.launch", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(DOC.parents[1])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str | Path, package: Path) -> tuple[int, str, str]:
    with palimpsest(*arguments, package=package) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output, errors


async def best_text(address: str, query: str) -> str:
    transport = Transport()
    try:
        async with RequestClient(transport.dealer(address)) as client:
            request = SearchRequest(request_id=client.next_id(), queries=[query], top_n=1)
            reply, _ = await client.request(request, SearchReply, timeout_s=TIMEOUT_S)
            return reply.results[0][0].text
    finally:
        transport.close()


def test_own_encoder_and_structure_are_indexed_and_served(package: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    chosen = ["--encoder", OWN_ENCODER, "--encoder-option", "dimension=64"]
    chosen += ["--structure", OWN_STRUCTURE, "--structure-option", "chunk_rows=2"]
    status, output, errors = run("index", corpus, "--out", out, *chosen, package=package)
    assert (status, f"(encoder {OWN_ENCODER}, 64 dimensions, {OWN_STRUCTURE})" in output) == (0, True), errors
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["encoder"] | {"fingerprint": ""} == {
        "use": OWN_ENCODER,
        "options": {"dimension": 64},
        "fingerprint": "",
        "dimension": 64,
    }
    assert manifest["structure"] == {"use": OWN_STRUCTURE, "options": {"chunk_rows": 2}}
    assert {"trigrams.npy", "vectors.float16.npy"} < set(manifest["sha256"])
    with palimpsest("retriever", out, "--address", "tcp://127.0.0.1:0", package=package) as serving:
        try:
            assert serving.stdout is not None
            ready = serving.stdout.readline()
            assert ready.endswith(f"(3 passages, encoder {OWN_ENCODER})\n")
            assert asyncio.run(best_text(ready.split()[3], "apples")) == "red apple ."
        finally:
            serving.terminate()


def test_the_command_s_error_is_one_sentence_that_names_the_import_path(package: Path, tmp_path: Path) -> None:
    status, _, errors = run("index", "c.jsonl", "--out", tmp_path / "i", "--encoder", "nowhere:X", package=package)
    assert (status, errors) == (
        2,
        "error: encoder.use: nowhere:X cannot be imported: there is no module 'nowhere'; add the folder that holds it "
        "to PYTHONPATH\n",
    )


@pytest.fixture
def own_index(importable: Path, corpus: Path, tmp_path: Path) -> Path:
    build_index(
        corpus=corpus,
        out=tmp_path / "own",
        encoder=encoder_section(OWN_ENCODER, {"dimension": 64}),
        structure=structure_section(OWN_STRUCTURE),
    )
    return tmp_path / "own"


def edit(package: Path, old: str, new: str) -> None:
    """Changes the user's code; it is imported again."""
    path = package / "my_retrieval.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    sys.modules.pop("my_retrieval")


def test_an_index_is_refused_if_its_encoder_is_another_one(own_index: Path, importable: Path) -> None:
    assert len(open_collections([f"a={own_index}", f"b={own_index}"], encoder=OWN_ENCODER)) == 2
    with pytest.raises(DataError, match=f"made with another encoder: expected {OWN_ENCODER}, found other:Encoder"):
        open_collections([str(own_index)], encoder="other:Encoder")
    edit(importable, "trigrams-1-", "trigrams-2-")
    with pytest.raises(DataError, match=r"fingerprint expected 'trigrams-1-.* \(made with .*\), found 'trigrams-2-"):
        open_collections([str(own_index)])


def test_an_index_is_refused_if_its_encoder_no_longer_takes_an_option(own_index: Path, importable: Path) -> None:
    edit(importable, "dimension: int = 256", "size: int = 256")
    with pytest.raises(ConfigError, match=rf"index {own_index}: encoder\.dimension: unknown key"):
        open_collections([str(own_index)])


def test_an_index_is_refused_if_its_structure_cannot_be_imported(own_index: Path, importable: Path) -> None:
    edit(importable, "class Float16Index", "class Float16Vectors")
    with pytest.raises(
        ConfigError, match=rf"index {own_index}: structure\.use: {OWN_STRUCTURE} .* has no 'Float16Index'; did you mean"
    ):
        load_index(own_index)


FAULTY = """
import numpy as np
from my_retrieval import Float16Index, Trigrams


class NoQueries:
    def fit(self, passages): ...
    def encode_passages(self, passages): ...
    def save_state(self, folder): ...
    def load_state(self, folder): ...


class NoBase(NoQueries):
    def encode_queries(self, queries): ...


class FitRaises(Trigrams):
    def fit(self, passages):
        raise RuntimeError("no vocabulary")


class NotUnit(Trigrams):
    def encode_passages(self, passages):
        return 2 * super().encode_passages(passages)


class WrongShape(Trigrams):
    def encode_passages(self, passages):
        return super().encode_passages(passages)[:, 1:]


class AddRaises(Float16Index):
    def add(self, vectors):
        raise RuntimeError("full")
"""


@pytest.mark.parametrize(
    ("encoder", "structure", "message"),
    [
        ("faulty:NoQueries", "flat", r"encoder\.use: faulty:NoQueries has no method encode_queries\(self, queries\)"),
        ("faulty:NoBase", "flat", r"encoder\.use: faulty:NoBase must be a subclass of retriever\.encoders\.base\.Enc"),
        ("faulty:FitRaises", "flat", r"encoder: faulty:FitRaises raised RuntimeError: no vocabulary \(faulty\.py, lin"),
        ("faulty:NotUnit", "flat", "encoder faulty:NotUnit: the vector of passage 'd0' must have length 1"),
        ("faulty:WrongShape", "flat", r"must return float32 \(3, 256\), got float32 \(3, 255\)"),
        ("bow", "faulty:AddRaises", "structure: faulty:AddRaises raised RuntimeError: full"),
        ("bow", "faulty:NoBase", r"structure\.use: faulty:NoBase has no method __len__\(self\)"),
    ],
)
def test_faulty_code_is_named(
    encoder: str, structure: str, message: str, importable: Path, corpus: Path, tmp_path: Path
) -> None:
    (importable / "faulty.py").write_text(FAULTY)
    encodes, finds = encoder_section(encoder), structure_section(structure)
    with pytest.raises((ConfigError, DataError), match=message):
        build_index(corpus=corpus, out=tmp_path / "out", encoder=encodes, structure=finds)
    assert not (tmp_path / "out").exists()


def test_options_are_toml_values_or_strings() -> None:
    arguments = ["a=1", "b=true", "c=word", "d=[1, 2]", 'e="1"', "f=x=y"]
    expected = {"a": 1, "b": True, "c": "word", "d": [1, 2], "e": "1", "f": "x=y"}
    assert parse_options(arguments, flag="--encoder-option") == expected
    with pytest.raises(ConfigError, match="--encoder-option must be key=value, got 'a'"):
        parse_options(["a"], flag="--encoder-option")
    with pytest.raises(ConfigError, match="--encoder-option a=2: a is given twice"):
        parse_options(["a=1", "a=2"], flag="--encoder-option")
