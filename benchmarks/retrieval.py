"""Recall of gold passages through the service, against exact search and BM25, and queries per second, on wiki_pool.

    python benchmarks/retrieval.py [--data DIR] [--quick]

The service is a separate process with its default settings, except that its cache is off; clients use real sockets.
Exact search compares with the same vectors. R@k is the fraction of a question's gold passages among the first k
results, averaged over questions. Queries per second: the median of rounds that alternate between 1 and 64 clients, all
on one sample of questions, stratified by data set. The last line is one JSON object. If DIR (or PALIMPSEST_DATA) has no
wiki_pool/, nothing is measured and the JSON object is {"skipped": REASON}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protocol.request_client import RequestClient
from protocol.search_messages import SearchReply, SearchRequest
from protocol.transport import Transport
from retriever.build_index import build_index
from retriever.corpus import PassageTable
from retriever.encoders.base import Compute, Encoder, passage_text
from retriever.extensions import HNSW, MINILM, create_encoder, encoder_section, structure_section
from retriever.index_folder import load_index
from retriever.structures.flat import search_exact

CUTS = (2, 5, 20)
NUM_CLIENTS = (1, 64)
NUM_TIMED = 300
NUM_ROUNDS = 3
REQUEST_TIMEOUT_S = 60.0
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Gold:
    dataset: str
    question: str
    gold_ids: frozenset[str]


class Bm25:
    """Okapi BM25 with the idf of Lucene, ln(1 + (n - df + 0.5) / (df + 0.5)), over lower-cased words."""

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(_words(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row, count in enumerate(counts):
            for word, occurrences in count.items():
                postings[word].append((row, occurrences))
        self._num_texts = len(texts)
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, entries in postings.items():
            rows, tf = (np.array(column) for column in zip(*entries, strict=True))
            idf = math.log(1 + (len(texts) - len(rows) + 0.5) / (len(rows) + 0.5))
            self._weights[word] = (rows, idf * tf * (k1 + 1) / (tf + norm[rows]))

    def search(self, question: str, k: int) -> list[int]:
        scores = np.zeros(self._num_texts)
        for word in _words(question):
            if word in self._weights:
                rows, weights = self._weights[word]
                scores[rows] += weights
        best = np.argpartition(-scores, k)[:k]
        return best[np.lexsort((best, -scores[best]))].tolist()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def read_questions(path: Path) -> list[Gold]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Gold(r["dataset"], r["question"], frozenset(r["gold_ids"])) for r in records]


def stratified(questions: Sequence[Gold], limit: int) -> list[Gold]:
    """Returns at most `limit` questions: evenly spaced within each data set, in proportion to its size."""
    if limit >= len(questions):
        return list(questions)
    by_dataset = sorted(questions, key=lambda q: q.dataset)
    return [by_dataset[number * len(questions) // limit] for number in range(limit)]


@contextmanager
def serving(folder: Path, *, threads: int, dtype: str) -> Iterator[str]:
    """Starts a retriever process without cache and yields its address."""
    code = "from retriever.command import retriever; retriever()"
    options = ["--address", "tcp://127.0.0.1:0", "--cache-size", "0", "--threads", str(threads), "--dtype", dtype]
    command = [sys.executable, "-c", code, str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("retriever: ready at "):
                raise SystemExit(f"the retriever did not start: {line!r}")
            yield line.split()[3]
        finally:
            process.terminate()
            print(process.stdout.read().strip() if process.stdout else "")
            process.wait(timeout=START_TIMEOUT_S)


async def ask_all(
    address: str, questions: Sequence[str], *, num_clients: int, top_n: int
) -> tuple[list[list[str]], float]:
    """Returns (ids by question, seconds). Each client has one request in flight."""
    transport = Transport()
    clients = [RequestClient(transport.dealer(address)) for _ in range(num_clients)]
    results: list[list[str]] = [[] for _ in questions]
    todo = iter(range(len(questions)))

    async def work(client: RequestClient) -> None:
        for number in todo:
            request = SearchRequest(request_id=client.next_id(), queries=[questions[number]], top_n=top_n)
            reply, _ = await client.request(request, SearchReply, timeout_s=REQUEST_TIMEOUT_S)
            results[number] = [passage.id for passage in reply.results[0]]

    for client in clients:
        await client.__aenter__()
    try:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for client in clients))
        return results, time.perf_counter() - started
    finally:
        for client in clients:
            await client.__aexit__()
        transport.close()


def recalls(questions: Sequence[Gold], results: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Returns per cent by data set and `R@k`."""
    table: dict[str, dict[str, float]] = {}
    for dataset in ("all", *dict.fromkeys(q.dataset for q in questions)):
        pairs = [(q.gold_ids, r) for q, r in zip(questions, results, strict=True) if dataset in ("all", q.dataset)]
        table[dataset] = {
            f"R@{k}": round(100 * sum(len(gold & set(ids[:k])) / len(gold) for gold, ids in pairs) / len(pairs), 2)
            for k in CUTS
        }
    return table


def exact(encoder: Encoder, passages: PassageTable, vectors: np.ndarray, questions: Sequence[str]) -> list[list[str]]:
    ids = [passage.id for passage in passages]
    results: list[list[str]] = []
    for start in range(0, len(questions), 64):
        queries = encoder.encode_queries(questions[start : start + 64])
        found = search_exact([vectors], queries, max(CUTS))
        results.extend([ids[row] for row in rows] for rows in found.rows)
    return results


def timed(address: str, texts: Sequence[str], *, num_rounds: int) -> dict[str, float]:
    """Returns queries/s by number of clients: medians of `num_rounds`, interleaved, so that other load affects all."""
    rates: dict[str, list[float]] = {str(num): [] for num in NUM_CLIENTS}
    for _ in range(num_rounds):
        for num in NUM_CLIENTS:
            _, seconds = asyncio.run(ask_all(address, texts, num_clients=num, top_n=max(CUTS)))
            rates[str(num)].append(len(texts) / seconds)
    return {num: round(statistics.median(each), 1) for num, each in rates.items()}


def read_vectors(npz: Path, passages: PassageTable) -> np.ndarray:
    """Returns float32 [n, dimension], in the order of `passages`."""
    with np.load(npz) as arrays:
        rows = {str(name): row for row, name in enumerate(arrays["ids"])}
        return arrays["vectors"].astype(np.float32)[[rows[passage.id] for passage in passages]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(os.environ.get("PALIMPSEST_DATA", beside))
    parser.add_argument("--data", type=Path, default=data, help="folder that contains wiki_pool/")
    parser.add_argument("--quick", action="store_true", help="300 questions instead of 2,855, and one timed round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="the encoder's precision")
    options = parser.parse_args()
    pool = options.data / "wiki_pool"
    npz = pool / "minilm_passages_fp16.npz"
    if missing := [p for p in (pool / "corpus.jsonl.gz", pool / "questions_dev.jsonl", npz) if not p.is_file()]:
        print(
            f"skipped: {missing[0]} does not exist; set --data or PALIMPSEST_DATA to a folder that contains wiki_pool/"
        )
        print(json.dumps({"skipped": f"no {missing[0]}"}))
        return
    questions = read_questions(pool / "questions_dev.jsonl")
    sample = [question.question for question in stratified(questions, NUM_TIMED)]
    if options.quick:
        questions = stratified(questions, NUM_TIMED)
    texts = [question.question for question in questions]
    compute = Compute(num_threads=options.threads, dtype=options.dtype)
    encoder = create_encoder(encoder_section(MINILM), compute=compute)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        started = time.perf_counter()
        build_index(
            corpus=pool / "corpus.jsonl.gz",
            out=folder,
            encoder=encoder_section(MINILM),
            structure=structure_section(HNSW),
            vectors=npz,
            compute=compute,
        )
        build_s = time.perf_counter() - started
        with serving(folder, threads=options.threads, dtype=options.dtype) as address:
            service, _ = asyncio.run(ask_all(address, texts, num_clients=max(NUM_CLIENTS), top_n=max(CUTS)))
            rates = timed(address, sample, num_rounds=1 if options.quick else NUM_ROUNDS)
        passages = load_index(folder).passages
        vectors = read_vectors(npz, passages)
        bm25 = Bm25([passage_text(passage) for passage in passages])
        lexical = [[passages[row].id for row in bm25.search(text, max(CUTS))] for text in texts]
        report = {
            "num_questions": len(questions),
            "build_from_vectors_s": round(build_s, 1),
            "service": recalls(questions, service),
            "exact": recalls(questions, exact(encoder, passages, vectors, texts)),
            "bm25": recalls(questions, lexical),
            "dtype": options.dtype,
            "threads": options.threads,
            "num_timed_questions": len(sample),
            "queries_per_s": rates,
        }
    lost = report["exact"]["all"]["R@5"] - report["service"]["all"]["R@5"]
    report["r5_points_below_exact"] = round(lost, 2)
    for name in ("service", "exact", "bm25"):
        print(name, report[name])
    for num_clients, rate in rates.items():
        print(f"{num_clients} clients: {rate} queries/s, encoding included")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
