"""Measures tokens/s of the embedded engine over HTTP, and of a plain batched transformers loop.

    python benchmarks/engine.py [--quick]

Both use the same model and one torch thread, in alternating rounds of one run; the median round is reported. The loop
is the shortest hand-written one: prompts of equal length in one batch, DynamicCache, multinomial sampling, log-probs
kept. The engine runs in a separate process and serves the same number of concurrent clients; each client sends its next
request after the response to the previous one. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import orjson

os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_RUNNING = 128


@dataclass(frozen=True, slots=True)
class Shape:
    num_prompt: int
    num_new: int

    def __str__(self) -> str:
        return f"{self.num_prompt}+{self.num_new}"


@dataclass(frozen=True, slots=True)
class Load:
    """`num_in_flight` clients, each of which sends `num_requests` requests one after another."""

    shape: Shape
    num_in_flight: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class Result:
    shape: str
    num_in_flight: int
    bare_tokens_per_s: float
    engine_tokens_per_s: float

    @property
    def ratio(self) -> float:
        return self.engine_tokens_per_s / self.bare_tokens_per_s


def save_model(folder: Path) -> None:
    """Saves a random model of the toy model's size, with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=98,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=192,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(98)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def serve(folder: str, connection: Connection) -> None:
    """Runs the engine's process: sends its URL, and serves until it receives a message."""
    import uvloop

    from actor.engine.server import EngineServer

    async def main() -> None:
        server = EngineServer(model_path=folder, max_running_requests=MAX_RUNNING)
        await server.start()
        connection.send(server.url)
        await asyncio.to_thread(connection.recv)
        await server.stop()

    uvloop.run(main())


def generate_load(url: str, connection: Connection) -> None:
    """Runs the clients' process: for each Load received, sends the tokens/s measured. None ends it."""
    import uvloop

    host, port = url.removeprefix("http://").split(":")
    while (load := connection.recv()) is not None:
        connection.send(uvloop.run(_run_clients(host, int(port), load)))


async def _run_clients(host: str, port: int, load: Load) -> float:
    streams = [await asyncio.open_connection(host, port) for _ in range(load.num_in_flight)]
    start_s = time.perf_counter()
    tokens = await asyncio.gather(*(_client(i, *stream, load) for i, stream in enumerate(streams)))
    elapsed_s = time.perf_counter() - start_s
    for _, writer in streams:
        writer.close()
    return sum(tokens) / elapsed_s


async def _client(index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, load: Load) -> int:
    """Writes HTTP by hand, because the clients share the cores with the engine. Returns the number of tokens."""
    num_tokens = 0
    for i in range(load.num_requests):
        body = orjson.dumps(
            {
                "input_ids": [(index * 31 + i * 7 + k) % 98 for k in range(load.shape.num_prompt)],
                "sampling_params": {"temperature": 1.0, "max_new_tokens": load.shape.num_new},
                "return_logprob": True,
            }
        )
        writer.write(b"POST /generate HTTP/1.1\r\nHost: engine\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        meta = orjson.loads(await reader.readexactly(length))["meta_info"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"] == load.shape.num_new
        num_tokens += meta["completion_tokens"]
    return num_tokens


class BareLoop:
    """Batched generation with transformers, as short as possible."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens_per_s(self, shape: Shape, *, num_sequences: int) -> float:
        from transformers import DynamicCache

        torch = self._torch
        start_s = time.perf_counter()
        with torch.inference_mode():
            tokens = torch.randint(0, 98, (num_sequences, shape.num_prompt))
            mask = torch.ones(num_sequences, shape.num_prompt + shape.num_new, dtype=torch.int64)
            cache = DynamicCache(config=self._model.config)
            output, output_logprobs = [], []
            for i in range(shape.num_new):
                logits = self._model(
                    input_ids=tokens,
                    attention_mask=mask[:, : shape.num_prompt + i],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                logprobs = logits.log_softmax(-1)
                tokens = logprobs.exp().multinomial(1)
                output.append(tokens)
                output_logprobs.append(logprobs.gather(-1, tokens))
            torch.cat(output, 1).tolist()
            torch.cat(output_logprobs, 1).tolist()
        return num_sequences * shape.num_new / (time.perf_counter() - start_s)


def measure(bare: BareLoop, connection: Connection, load: Load, *, num_rounds: int) -> Result:
    """Alternates rounds of engine and bare loop; while one runs, the other is idle."""
    bare_rates: list[float] = []
    engine_rates: list[float] = []
    for _ in range(num_rounds):
        rates = [bare.tokens_per_s(load.shape, num_sequences=load.num_in_flight) for _ in range(load.num_requests)]
        bare_rates.append(statistics.harmonic_mean(rates))
        connection.send(load)
        engine_rates.append(connection.recv())
    return Result(
        shape=str(load.shape),
        num_in_flight=load.num_in_flight,
        bare_tokens_per_s=statistics.median(bare_rates),
        engine_tokens_per_s=statistics.median(engine_rates),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and requests")
    quick = parser.parse_args().quick
    num_rounds = 3 if quick else 7
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        server_end, server_side = spawn.Pipe()
        server = spawn.Process(target=serve, args=(name, server_side), daemon=True)
        server.start()
        url = server_end.recv()
        load_end, load_side = spawn.Pipe()
        clients = spawn.Process(target=generate_load, args=(url, load_side), daemon=True)
        clients.start()
        bare = BareLoop(folder)
        results: list[Result] = []
        for shape, requests in ((Shape(26, 7), 10 if quick else 30), (Shape(256, 256), 1)):
            for num_in_flight in (1, 16, 64, 128):
                load = Load(shape=shape, num_in_flight=num_in_flight, num_requests=requests)
                if not results or results[-1].shape != str(shape):
                    measure(bare, load_end, load, num_rounds=1)
                result = measure(bare, load_end, load, num_rounds=num_rounds if shape.num_new < 100 else 3)
                results.append(result)
                print(
                    f"{result.shape:>8} tokens, {result.num_in_flight:>3} in flight: engine "
                    f"{result.engine_tokens_per_s:8.0f} tokens/s, bare loop {result.bare_tokens_per_s:8.0f}, "
                    f"ratio {result.ratio:.2f}"
                )
        load_end.send(None)
        server_end.send("stop")
        clients.join()
        server.join()
    at_64 = [result.ratio for result in results if result.num_in_flight == 64]
    print(
        json.dumps(
            {
                "benchmark": "engine",
                "ratio_at_64_min": round(min(at_64), 3),
                "target_ratio_at_64": 0.5,
                "results": [
                    {
                        "shape": result.shape,
                        "num_in_flight": result.num_in_flight,
                        "engine_tokens_per_s": round(result.engine_tokens_per_s),
                        "bare_tokens_per_s": round(result.bare_tokens_per_s),
                        "ratio": round(result.ratio, 3),
                    }
                    for result in results
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
