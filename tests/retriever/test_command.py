from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from protocol.errors import ConfigError, DataError, SecurityError, UnreachableError, UserError
from protocol.request_client import RequestClient
from protocol.search_messages import SearchReply, SearchRequest
from protocol.transport import Transport
from retriever.command import index, retriever
from retriever.index_folder import load_index

TIMEOUT_S = 60.0


def invoke(*arguments: str | Path) -> str:
    """Runs the command in this process. Raises: the command's exception."""
    command = index if arguments[0] == "index" else retriever
    result = CliRunner().invoke(command, [str(a) for a in arguments[1:]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    code = "from retriever.command import retriever; retriever()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def test_index_and_serve_a_model(tmp_path: Path, model_folder: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "title": "red", "text": "apple"}\n{"id": "b", "text": "green pear"}\n')
    out = tmp_path / "index"
    printed = invoke(
        "index",
        corpus,
        "--out",
        out,
        "--encoder",
        model_folder,
        "--preset",
        "e5",
        "--passage-prefix",
        "",
        "--max-tokens",
        "16",
    )
    assert f"index: 2 passages in {out} (encoder {model_folder}, 32 dimensions, HNSW M=32" in printed
    options = load_index(out).manifest.encoder.options
    prefixes = {"query_prefix": "query: ", "passage_prefix": ""}
    assert options == {**prefixes, "pooling": "mean", "max_tokens": 16, "folder": str(model_folder)}
    with pytest.raises(DataError, match="exists"):
        invoke("index", corpus, "--out", out, "--encoder", model_folder, "--max-tokens", "16")
    with pytest.raises(DataError, match="another encoder"):
        invoke("retriever", out, "--encoder", "bow")


def test_flags_that_an_encoder_does_not_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--encoder bow takes no"):
        invoke("index", tmp_path / "c.jsonl", "--out", tmp_path / "i", "--encoder", "bow", "--pooling", "cls")
    with pytest.raises(DataError, match="no encoder preset 'e6'; the presets are minilm, e5, bge"):
        invoke("index", tmp_path / "c.jsonl", "--out", tmp_path / "i", "--preset", "e6")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_prints_when_it_is_ready_and_exits_with_status_0_on_a_signal(
    bow_index: Path, number: signal.Signals
) -> None:
    with process(str(bow_index), "--address", "tcp://127.0.0.1:0") as running:
        assert running.stdout is not None
        assert running.stderr is not None
        ready = running.stdout.readline()
        assert ready.startswith("retriever: ready at tcp://127.0.0.1:")
        assert ready.endswith("(3 passages, encoder bow)\n")
        assert asyncio.run(_ask(ready.split()[3], "green")) == "green pear ."
        with pytest.raises(UnreachableError, match="cannot listen on tcp://127"):
            invoke("retriever", bow_index, "--address", ready.split()[3])
        running.send_signal(number)
        assert running.wait(timeout=TIMEOUT_S) == 0
        assert "retriever: stopped; 1 queries of 1 requests in 1 batches" in running.stdout.read()
        assert running.stderr.read() == ""


async def _ask(address: str, query: str) -> str:
    transport = Transport()
    try:
        async with RequestClient(transport.dealer(address)) as client:
            request = SearchRequest(request_id=client.next_id(), queries=[query], top_n=1)
            reply, _ = await client.request(request, SearchReply, timeout_s=TIMEOUT_S)
            return reply.results[0][0].text
    finally:
        transport.close()


def test_an_address_beyond_loopback_needs_keys(bow_index: Path) -> None:
    with pytest.raises(SecurityError, match="needs CURVE keys"):
        invoke("retriever", bow_index, "--address", "tcp://0.0.0.0:0")


def test_bad_input_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an index"):
        invoke("retriever", tmp_path)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, retriever.command; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'zmq', 'hnswlib', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
