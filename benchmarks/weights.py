"""Weights from the learner to the engines: how small, how fast, and how long engines stand still.

    python benchmarks/weights.py [--quick] [--rates 1e-6,1e-5,1e-4,1e-3]

Codec: bf16 copies of fp32 masters N(0, 0.02) under AdamW, Gaussian gradients with a log-normal scale for each
parameter; cold from optimiser step 0, warm from step 16, versions 1 and 4 steps apart. Per cent of the full bf16 bytes;
GB/s of full bf16 on one core, in processor time, the median of interleaved rounds, warm and 1 step apart; decoding
includes the checksum of all that it makes. One master for each rate, the same gradients.

Plane: a publisher here, embedded engines and their agents in processes of their own, over real sockets, with requests
in flight at each engine, bf16 weights, 1e-6 between versions. `serving_s`: from the offer of a version (its delta is
made: `offer_s`) until every engine has reported that it serves it. `pause_s`: per engine and update.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/learner.py would be taken for the package

import numpy as np
import torch
from safetensors.torch import load_file, save
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor.sampling import SamplingParams
from actor.sglang_client import SGLangClient
from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer
from learner.engines import Engines
from learner.publications import Series
from learner.publisher import Publisher
from learner.scorer import Scorer
from learner.weights import canary
from protocol.config import Config, EngineConfig, ModelConfig, NetworkConfig, RunConfig, TaskConfig, WorkflowConfig
from protocol.config_file import save_config
from protocol.deltas import checksum, decode, encode
from protocol.errors import EngineError
from protocol.transport import Transport

WARM = 16
BETAS = 0.9, 0.95
WAIT_S = 120.0


class Masters:
    """One fp32 master a learning rate under the same AdamW directions."""

    def __init__(self, num: int, rates: list[str], *, seed: int) -> None:
        torch.manual_seed(seed)
        start = torch.randn(num) * 0.02
        self.masters = {rate: start.clone() for rate in rates}
        self._scale = torch.exp(1.5 * torch.randn(num))
        self._mean, self._square = torch.zeros(num), torch.zeros(num)
        self._num_steps = 0

    def step(self) -> None:
        self._num_steps += 1
        gradient = torch.randn(len(self._scale)).mul_(self._scale)
        self._mean.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        self._square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        root = (self._square / (1 - BETAS[1] ** self._num_steps)).sqrt_().add_(1e-8)
        direction = (self._mean / (1 - BETAS[0] ** self._num_steps)).div_(root)
        for rate, master in self.masters.items():
            master.add_(direction, alpha=-float(rate))

    def published(self) -> dict[str, bytes]:
        return {rate: as_bf16(master) for rate, master in self.masters.items()}


def as_bf16(master: torch.Tensor) -> bytes:
    return master.bfloat16().view(torch.int16).numpy().tobytes()


def codec(num: int, rates: list[str], *, rounds: int) -> dict[str, dict[str, float]]:
    masters = Masters(num, rates, seed=0)
    before = masters.published()
    masters.step()
    cold = {rate: share(data, before[rate]) for rate, data in masters.published().items()}
    for _ in range(WARM - 1):
        masters.step()
    warm = masters.published()
    masters.step()
    one = masters.published()
    for _ in range(3):
        masters.step()
    four = masters.published()
    found: dict[str, dict[str, float]] = {}
    times = measure(one, warm, rounds=rounds)
    for rate in rates:
        snapshot = len(encode(one[rate], None, word_bytes=2)) / len(one[rate])
        found[rate] = {
            "changed": round(100 * float((words(one[rate]) != words(warm[rate])).mean()), 2),
            "warm_1": share(one[rate], warm[rate]),
            "warm_4": share(four[rate], warm[rate]),
            "cold_1": cold[rate],
            "snapshot": round(100 * snapshot, 2),
            **times[rate],
        }
        print(rate, found[rate], flush=True)
    return found


def share(target: bytes, base: bytes) -> float:
    """Per cent of the full bytes. The delta must give them back."""
    payload = encode(target, base, word_bytes=2)
    assert decode(payload, base, num_bytes=len(target), word_bytes=2, expected=checksum(target)) == target
    return round(100 * len(payload) / len(target), 3)


def words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint16)


def measure(targets: dict[str, bytes], bases: dict[str, bytes], *, rounds: int) -> dict[str, dict[str, float]]:
    taken: dict[tuple[str, str], list[float]] = {}
    out = bytearray(len(next(iter(targets.values()))))  # as an agent keeps it

    def clock(rate: str, name: str, work: Callable[[], bytes | bytearray]) -> bytes | bytearray:
        started = time.process_time()
        made = work()
        taken.setdefault((rate, name), []).append(time.process_time() - started)
        return made

    for _ in range(rounds):
        for rate, target in targets.items():
            base, size, expected = bases[rate], len(target), checksum(target)
            payload = clock(rate, "encode_GBps", lambda: encode(target, base, word_bytes=2))  # noqa: B023
            clock(
                rate,
                "decode_GBps",
                lambda: decode(payload, base, num_bytes=size, word_bytes=2, expected=expected, out=out),  # noqa: B023
            )
    return {
        rate: {
            name: round(len(target) / 1e9 / statistics.median(taken[rate, name]), 2)
            for name in ("encode_GBps", "decode_GBps")
        }
        for rate, target in targets.items()
    }


# --- the plane ---


def save_model(folder: Path, *, width: int, layers: int) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def versions(model: Path, *, rate: float) -> Iterator[dict[str, torch.Tensor]]:
    """fp32 weights, each version one sign step of the rate further."""
    weights = load_file(model / "model.safetensors")
    while True:
        yield weights
        weights = {name: tensor + rate * torch.randn_like(tensor).sign() for name, tensor in weights.items()}


@asynccontextmanager
async def engine_processes(config: Config, folder: Path, num_engines: int):
    path = folder / "config.json"
    save_config(config, path)
    command = [sys.executable, "-m", "learner.launch", "engine", str(path)]
    root = Path(__file__).resolve().parents[1]
    processes = []
    try:
        for number in range(num_engines):
            with (folder / f"engine-{number}.log").open("wb") as log:
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *command, "--name", f"engine-{number}", cwd=root, stdout=log, stderr=log
                    )
                )
        yield
    finally:
        for process in processes:
            process.terminate()
        await asyncio.gather(*(process.wait() for process in processes))


async def busy(url: str, *, num_requests: int) -> None:
    """Requests in flight at an engine, until cancelled."""

    async def ask(client: SGLangClient, number: int) -> None:
        while True:
            try:
                await client.generate([3 + number % 20, 5, 7], SamplingParams(max_new_tokens=64))
            except EngineError:
                await asyncio.sleep(0.05)

    async with SGLangClient(url) as client, asyncio.TaskGroup() as tasks:
        for number in range(num_requests):
            tasks.create_task(ask(client, number))


async def plane(folder: Path, *, width: int, layers: int, num_engines: int, num_updates: int) -> dict[str, float]:
    model = save_model(folder / "model", width=width, layers=layers)
    changed = asyncio.Event()

    transport, engines = Transport(), Engines()
    publisher = Publisher(
        router=(router := transport.router("tcp://127.0.0.1:0")),
        announcements=(announcements := transport.publisher("tcp://127.0.0.1:0")),
        engines=engines,
        run_id="run",
        on_engines_changed=changed.set,
    )
    ports = [int(socket.address.rpartition(":")[2]) for socket in (router, announcements)]
    config = Config(
        run=RunConfig(dir=folder / "run"),
        network=NetworkConfig(weights_port=ports[0], announce_port=ports[1]),
        model=ModelConfig(path=model),
        task=TaskConfig(kind="toy", worlds=(1,)),
        workflow=WorkflowConfig(rendering="toy", context_tokens=128, action_tokens=8, memory_tokens=8),
        engine=EngineConfig(max_running_requests=32),
    )
    series = Series("run")
    serving = asyncio.create_task(publisher.serve())
    learner = Qwen2ForCausalLM.from_pretrained(model).eval()
    scorer = Scorer(learner)
    times: dict[str, list[float]] = {"offer_s": [], "serving_s": [], "pause_s": []}
    load: list[asyncio.Task[None]] = []
    try:
        async with engine_processes(config, folder, num_engines):
            for version, weights in zip(range(num_updates + 1), versions(model, rate=1e-6), strict=False):
                data = save({name: tensor.bfloat16() for name, tensor in weights.items()})
                learner.load_state_dict({name: tensor.bfloat16().float() for name, tensor in weights.items()}, False)
                proof = canary(scorer, device=torch.device("cpu"))
                started = time.perf_counter()
                offer = await asyncio.to_thread(series.offer, data, publication=version, version=version, canary=proof)
                offered = time.perf_counter()
                paused_s = paused(engines)
                await publisher.offer(offer)
                async with asyncio.timeout(WAIT_S):
                    while not all_serve(engines, version, num_engines):
                        changed.clear()
                        await changed.wait()
                if version == 0:
                    load = [asyncio.create_task(busy(url, num_requests=16)) for url in urls(engines)]
                    await asyncio.sleep(1.0)
                    continue
                times["offer_s"].append(offered - started)
                times["serving_s"].append(time.perf_counter() - offered)
                times["pause_s"] += [now - then for now, then in zip(paused(engines), paused_s, strict=True)]
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        transport.close()
    print({name: [round(value, 3) for value in values] for name, values in times.items()}, flush=True)
    return {
        "megabytes": round(len(data) / 1e6, 1),
        "engines": num_engines,
        **{f"{name}_p50": round(statistics.median(values), 4) for name, values in times.items()},
    }


def all_serve(engines: Engines, version: int, num_engines: int) -> bool:
    return [engine.version for engine in engines.serving(now_s=time.monotonic())] == [version] * num_engines


def urls(engines: Engines) -> list[str]:
    return [engine.url for engine in engines.serving(now_s=time.monotonic())]


def paused(engines: Engines) -> list[float]:
    """Seconds so far, an engine each."""
    reports = [known.report for known in engines._known.values()]
    return [report.counters.get("paused_s", 0.0) for report in sorted(reports, key=lambda report: report.engine.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4M parameters instead of 50M, the demo's model")
    parser.add_argument("--rates", default="1e-6,1e-5,1e-4,1e-3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {
        **codec(4_000_000 if options.quick else 50_000_000, options.rates.split(","), rounds=options.rounds)
    }
    shapes = {"demo": (64, 2)} if options.quick else {"demo": (64, 2), "wide": (512, 8)}
    for name, (width, layers) in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = asyncio.run(
                plane(
                    Path(folder),
                    width=width,
                    layers=layers,
                    num_engines=options.engines,
                    num_updates=5 if options.quick else 20,
                )
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
