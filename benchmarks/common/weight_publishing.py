"""Publishes weights to serving engines, for benchmarks/weights.py: engines and agents are processes."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient
from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer
from learner.leases.engines import Engines
from learner.model.export import canary
from learner.model.scorer import Scorer
from learner.network.publisher import Publisher
from learner.network.weight_deltas import Series
from protocol.config import Config, EngineConfig, ModelConfig, NetworkConfig, RunConfig, TaskConfig, WorkflowConfig
from protocol.config_file import save_config
from protocol.errors import EngineError
from protocol.transport import Transport

WAIT_S = 120.0


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
    """Yields fp32 weights; each version adds ±`rate` to every value."""
    weights = load_file(model / "model.safetensors")
    while True:
        yield weights
        weights = {name: tensor + rate * torch.randn_like(tensor).sign() for name, tensor in weights.items()}


@asynccontextmanager
async def engine_processes(config: Config, folder: Path, num_engines: int):
    path = folder / "config.json"
    save_config(config, path)
    command = [sys.executable, "-m", "learner.launch", "engine", str(path)]
    root = Path(__file__).resolve().parents[2]
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


async def keep_busy(url: str, *, num_requests: int) -> None:
    """Keeps `num_requests` requests in flight at an engine until cancelled."""

    async def ask(client: SGLangClient, number: int) -> None:
        while True:
            try:
                await client.generate([3 + number % 20, 5, 7], SamplingParams(max_new_tokens=64))
            except EngineError:
                await asyncio.sleep(0.05)

    async with SGLangClient(url) as client, asyncio.TaskGroup() as tasks:
        for number in range(num_requests):
            tasks.create_task(ask(client, number))


class WeightPublishing:
    """A publisher of versions of one model. Use `open`."""

    def __init__(self, transport: Transport, model: Path) -> None:
        self._changed = asyncio.Event()
        self._series = Series("run")
        self._learner = Qwen2ForCausalLM.from_pretrained(model).eval()
        self._scorer = Scorer(self._learner)
        self.engines = Engines()
        self.publisher = Publisher(
            router=transport.router("tcp://127.0.0.1:0"),
            announcements=transport.publisher("tcp://127.0.0.1:0"),
            engines=self.engines,
            run_id="run",
            on_engines_changed=self._changed.set,
        )

    @classmethod
    @asynccontextmanager
    async def open(cls, model: Path) -> AsyncIterator[WeightPublishing]:
        transport = Transport()
        publishing = cls(transport, model)
        serving = asyncio.create_task(publishing.publisher.serve())
        try:
            yield publishing
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            transport.close()

    def config(self, folder: Path, model: Path) -> Config:
        """The config of engines that fetch from this publisher."""
        addresses = self.publisher.weights_address, self.publisher.announce_address
        weights, announce = (int(address.rpartition(":")[2]) for address in addresses)
        return Config(
            run=RunConfig(dir=folder / "run"),
            network=NetworkConfig(weights_port=weights, announce_port=announce),
            model=ModelConfig(path=model),
            task=TaskConfig.model_validate({"use": "toy", "worlds": [1]}),
            workflow=WorkflowConfig.model_validate(
                {"rendering": "toy", "context_tokens": 128, "action_tokens": 8, "memory_tokens": 8}
            ),
            engine=EngineConfig(max_running_requests=32),
        )

    async def publish(
        self, weights: dict[str, torch.Tensor], version: int, *, num_engines: int
    ) -> tuple[int, dict[str, list[float]]]:
        """Publishes and waits until every engine serves `weights`. Returns (file size in bytes, durations by name)."""
        data = save({name: tensor.bfloat16() for name, tensor in weights.items()})
        self._learner.load_state_dict({name: tensor.bfloat16().float() for name, tensor in weights.items()}, False)
        proof = canary(self._scorer, device=torch.device("cpu"))
        started_s, paused_s = time.perf_counter(), self._paused()
        offer = await asyncio.to_thread(
            self._series.make_offer, data, publication=version, version=version, canary=proof
        )
        offered_s = time.perf_counter()
        await self.publisher.announce(offer)
        async with asyncio.timeout(WAIT_S):
            while [engine.version for engine in self._serving()] != [version] * num_engines:
                self._changed.clear()
                await self._changed.wait()
        return len(data), {
            "offer_s": [offered_s - started_s],
            "serving_s": [time.perf_counter() - offered_s],
            "pause_s": [now - then for now, then in zip(self._paused(), paused_s, strict=False)],
        }

    def urls(self) -> list[str]:
        return [engine.url for engine in self._serving()]

    def _serving(self) -> list:
        return self.engines.serving(now_s=time.monotonic())

    def _paused(self) -> list[float]:
        """Seconds paused so far, one value per engine."""
        reports = sorted(self.engines.reports(), key=lambda report: report.engine.name)
        return [report.counters.get("paused_s", 0.0) for report in reports]


async def publish_to_busy_engines(
    folder: Path, *, width: int, layers: int, num_engines: int, num_updates: int
) -> dict[str, float]:
    """Publishes version 0 to starting engines, then updates of rate 1e-6 while each has 16 requests in flight."""
    model = save_model(folder / "model", width=width, layers=layers)
    times: dict[str, list[float]] = {"offer_s": [], "serving_s": [], "pause_s": []}
    async with (
        WeightPublishing.open(model) as publishing,
        engine_processes(publishing.config(folder, model), folder, num_engines),
    ):
        weights = versions(model, rate=1e-6)
        num_bytes, _ = await publishing.publish(next(weights), 0, num_engines=num_engines)
        load = [asyncio.create_task(keep_busy(url, num_requests=16)) for url in publishing.urls()]
        await asyncio.sleep(1.0)
        for version in range(1, num_updates + 1):
            _, took = await publishing.publish(next(weights), version, num_engines=num_engines)
            for name, values in took.items():
                times[name] += values
            shown = {name: [round(value, 3) for value in values] for name, values in took.items()}
            print(f"version {version}: {shown}", flush=True)
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    return {
        "megabytes": round(num_bytes / 1e6, 1),
        "engines": num_engines,
        **{f"{name}_p50": round(statistics.median(values), 4) for name, values in times.items()},
    }
