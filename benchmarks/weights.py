"""Measures weight publication: size of deltas, speed of the codec, and how long updates pause the engines.

    python benchmarks/weights.py [--quick] [--rates 1e-6,1e-5,1e-4,1e-3]

Codec: bf16 copies of fp32 weights N(0, 0.02) that AdamW updates, with Gaussian gradients of a log-normal scale per
parameter. `cold`: from optimiser step 0; `warm`: from step 16; versions are 1 or 4 steps apart. Sizes are in % of the
full bf16 bytes. Speeds are in GB/s of full bf16 on one core, in processor time: the median of interleaved rounds,
warm, 1 step apart. Decoding includes the checksum of its output. Each learning rate has its own weights; all have the
same gradients.

Publication: a publisher in this process; embedded engines with their agents in separate processes, over real sockets,
with requests in flight at each engine; bf16 weights that differ by 1e-6 between versions. `offer_s`: time to make the
delta. `serving_s`: from then until every engine has reported that it serves the version. `pause_s`: per engine and
update. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `import learner` would find benchmarks/learner.py

import numpy as np
import torch

from benchmarks.common.weight_publishing import publish_to_busy_engines
from protocol.deltas import checksum, decode, encode

WARM = 16
BETAS = 0.9, 0.95


class MasterWeights:
    """fp32 weights for each learning rate, updated with the same AdamW directions."""

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


def measure_codec(num: int, rates: list[str], *, rounds: int) -> dict[str, dict[str, float]]:
    masters = MasterWeights(num, rates, seed=0)
    before = masters.published()
    masters.step()
    cold = {rate: delta_percent(data, before[rate]) for rate, data in masters.published().items()}
    for _ in range(WARM - 1):
        masters.step()
    warm = masters.published()
    masters.step()
    one = masters.published()
    for _ in range(3):
        masters.step()
    four = masters.published()
    found: dict[str, dict[str, float]] = {}
    times = measure_speed(one, warm, rounds=rounds)
    for rate in rates:
        snapshot = len(encode(one[rate], None, word_bytes=2)) / len(one[rate])
        found[rate] = {
            "changed": round(100 * float((words(one[rate]) != words(warm[rate])).mean()), 2),
            "warm_1": delta_percent(one[rate], warm[rate]),
            "warm_4": delta_percent(four[rate], warm[rate]),
            "cold_1": cold[rate],
            "snapshot": round(100 * snapshot, 2),
            **times[rate],
        }
        print(rate, found[rate], flush=True)
    return found


def delta_percent(target: bytes, base: bytes) -> float:
    """Returns the size of the delta in per cent of `target`, after checking that it decodes to `target`."""
    payload = encode(target, base, word_bytes=2)
    assert decode(payload, base, num_bytes=len(target), word_bytes=2, expected=checksum(target)) == target
    return round(100 * len(payload) / len(target), 3)


def words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint16)


def measure_speed(targets: dict[str, bytes], bases: dict[str, bytes], *, rounds: int) -> dict[str, dict[str, float]]:
    taken: dict[tuple[str, str], list[float]] = {}
    out = bytearray(len(next(iter(targets.values()))))  # reused, as in the weight fetcher

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4M parameters instead of 50M, the demo's model")
    parser.add_argument("--rates", default="1e-6,1e-5,1e-4,1e-3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {
        **measure_codec(4_000_000 if options.quick else 50_000_000, options.rates.split(","), rounds=options.rounds)
    }
    shapes = {"demo": (64, 2)} if options.quick else {"demo": (64, 2), "wide": (512, 8)}
    for name, (width, layers) in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = asyncio.run(
                publish_to_busy_engines(
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
