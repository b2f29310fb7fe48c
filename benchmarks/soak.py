"""Memory growth: the resident memory of every process of a long toy run, step by step.

    python benchmarks/soak.py [--quick] [--steps 1000] [--from-step 200] [--seed 0]

Runs `palimpsest demo` and reads the resident memory of its processes from /proc after each step (Linux). `growth`, for
each process: the median over the last tenth of the steps divided by the median over the tenth around `--from-step`,
minus 1. `curve`: megabytes at ten steps. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from learner.metrics.jsonl import last_step
from learner.store.run_folder import RunFolder
from protocol.resident_memory import resident_mb

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.1
ROLES = ("learner", "actor", "engine", "retriever")

Samples = dict[str, dict[int, float]]
"""Process → step → megabytes."""


def watch(run_dir: Path, demo: subprocess.Popen[bytes]) -> Samples:
    """Samples memory until the demo has ended."""
    folder = RunFolder(run_dir)
    samples: Samples = {}
    seen = -1
    while demo.poll() is None:
        time.sleep(POLL_S)
        if (step := last_step(folder.metrics)) <= seen:
            continue
        seen = step
        for name, pid in json.loads(folder.processes.read_text()).items():
            try:
                if name.startswith(ROLES):
                    samples.setdefault(name, {})[step] = resident_mb(pid)
            except FileNotFoundError:  # the process has just ended
                pass
        if step % 50 == 0:
            print(
                f"step {step}: { ({name: round(by_step[max(by_step)], 1) for name, by_step in samples.items()}) } MB",
                flush=True,
            )
    return samples


def median_around(samples: dict[int, float], first: int, last: int) -> float:
    return statistics.median(megabytes for step, megabytes in samples.items() if first <= step <= last)


def summary(samples: Samples, *, from_step: int, num_steps: int) -> dict[str, object]:
    half, last = num_steps // 20, num_steps - 1
    growth = {
        name: median_around(by_step, last - 2 * half, last) / median_around(by_step, from_step - half, from_step + half)
        - 1
        for name, by_step in samples.items()
    }
    points = [round(last * (i + 1) / 10) for i in range(10)]
    return {
        "growth": {name: round(value, 4) for name, value in growth.items()},
        "curve": {
            name: {point: round(median_around(by_step, point - half // 2, point), 1) for point in points}
            for name, by_step in samples.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps, from step 20")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--from-step", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.from_step = 60, 20
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        arguments = ["demo", "--quiet", "--seed", options.seed, "--steps", options.steps, "--eval-questions", 64]
        command = [sys.executable, "-m", "learner.launch", *map(str, arguments), "--run-dir", str(run_dir)]
        with subprocess.Popen(command, cwd=ROOT) as demo:
            try:
                samples = watch(run_dir, demo)
            except BaseException:
                demo.terminate()
                raise
    if demo.returncode:
        sys.exit(f"soak: the demo ended with {demo.returncode}")
    result = summary(samples, from_step=options.from_step, num_steps=options.steps)
    print(json.dumps({"benchmark": "soak", "steps": options.steps, "from_step": options.from_step, **result}))


if __name__ == "__main__":
    main()
