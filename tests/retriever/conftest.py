"""Small corpora, a toy world, a tiny model folder, and a service on a real socket."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson
import pytest

from protocol.transport import Transport
from retriever.build_index import build_index
from retriever.collection import open_collections
from retriever.extensions import encoder_section, structure_section
from retriever.search import Searcher
from retriever.service import RetrieverService, ServiceLimits

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]


class Fact(NamedTuple):
    subject: str
    relation: str
    object: str

    @property
    def text(self) -> str:
        return f"{self.subject} {self.relation} {self.object} ."


def build_bow_index(corpus: Path, out: Path) -> Path:
    build_index(corpus=corpus, out=out, encoder=encoder_section("bow"), structure=structure_section("flat"))
    return out


def write_corpus(path: Path, texts: Sequence[str]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"id": f"d{i}", "text": t}) + b"\n" for i, t in enumerate(texts)))
    return path


def toy_facts(seed: int) -> list[Fact]:
    """The 2,120 facts of a toy world; marriages are mutual."""
    rng = random.Random(seed)
    names = rng.sample([a + b for a in SYLLABLES for b in SYLLABLES if a != b], 860)
    persons, companies, cities, countries = names[:400], names[400:600], names[600:800], names[800:]
    facts = [Fact(p, "birthplace", rng.choice(cities)) for p in persons]
    facts += [Fact(p, "employer", rng.choice(companies)) for p in persons]
    facts += [Fact(persons[i], "spouse", persons[i ^ 1]) for i in range(len(persons))]
    facts += [Fact(c, "founder", rng.choice(persons)) for c in companies]
    facts += [Fact(c, "headquarters", rng.choice(cities)) for c in companies]
    facts += [Fact(c, "country", rng.choice(countries)) for c in cities]
    facts += [Fact(c, "mayor", rng.choice(persons)) for c in cities]
    facts += [Fact(c, "capital", rng.choice(cities)) for c in countries]
    facts += [Fact(c, "leader", rng.choice(persons)) for c in countries]
    return facts


@pytest.fixture(name="write_corpus", scope="session")
def _write_corpus() -> Callable[[Path, Sequence[str]], Path]:
    return write_corpus


@pytest.fixture(name="build_bow_index", scope="session")
def _build_bow_index() -> Callable[[Path, Path], Path]:
    return build_bow_index


@pytest.fixture(name="toy_facts", scope="session")
def _toy_facts() -> Callable[[int], list[Fact]]:
    return toy_facts


@pytest.fixture(scope="session")
def facts() -> list[Fact]:
    return toy_facts(0)


@pytest.fixture(scope="session")
def toy_index(tmp_path_factory: pytest.TempPathFactory, facts: list[Fact]) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    corpus = write_corpus(folder / "corpus.jsonl", [fact.text for fact in facts])
    return build_bow_index(corpus, folder / "index")


@pytest.fixture
def bow_index(tmp_path: Path) -> Path:
    """Three passages."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["red apple .", "green pear .", "red pear tree ."])
    return build_bow_index(corpus, tmp_path / "index")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face BERT of 32 dimensions with random weights and a WordPiece tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "apple", "pear", "tree", "query", ":", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wiki_pool() -> Path:
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PALIMPSEST_DATA", default)) / "wiki_pool"
    if not folder.is_dir():
        pytest.skip(f"no wiki_pool data in {folder}; set PALIMPSEST_DATA to the data folder")
    return folder


@dataclass(frozen=True)
class Running:
    service: RetrieverService
    searcher: Searcher
    address: str
    transport: Transport


Serve = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def serve() -> Serve:
    """`async with serve(*indexes, limits=…) as running` runs a service in this process on a real socket."""

    @asynccontextmanager
    async def run(*indexes: str | Path, limits: ServiceLimits | None = None) -> AsyncIterator[Running]:
        transport = Transport()
        searcher = Searcher(open_collections([str(index) for index in indexes]))
        service = RetrieverService(router=transport.router("tcp://127.0.0.1:0"), searcher=searcher, limits=limits)
        serving = asyncio.create_task(service.run())
        try:
            yield Running(service, searcher, service.address, transport)
        finally:
            serving.cancel()
            await asyncio.wait([serving])
            transport.close()

    return run
