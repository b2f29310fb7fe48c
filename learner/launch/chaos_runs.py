"""`palimpsest chaos --runs N`: runs of the toy task under faults, each with its own seed, and their audits.

corpus, index, untrained model (once) ─► for each seed: up ─► faults ─► last step ─► audit ─► one line
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from learner.launch.chaos import Chaos
from learner.launch.fault_draw import RunPlan
from learner.launch.up import is_finished
from learner.metrics.jsonl import last_step
from learner.store.audit import audit_run
from learner.store.folder_lock import is_locked
from learner.store.run_folder import RunFolder
from protocol.config_file import load_config
from protocol.errors import PalimpsestError

_POLL_S = 0.1
_RUN_TIMEOUT_S = 600.0
_ORPHAN_TIMEOUT_S = 30.0

_CONFIG = """
[run]
name = "chaos"
dir = "run"
seed = {seed}
[model]
path = "{files}/model"
[task]
use = "toy"
worlds = [1]
eval_worlds = [1]
[reward]
use = "{reward}"
[[tool]]
use = "search"
top_n = 2
[workflow]
use = "memsearcher"
rendering = "toy"
max_turns = 3
action_tokens = 8
memory_tokens = 8
context_tokens = 128
[actor]
count = 2
max_trajectories = 8
drain_s = 2.0
[engine]
count = 1
max_running_requests = 16
[retriever]
indexes = {{ world-1 = "{files}/index" }}
[learner]
num_steps = {num_steps}
groups_per_batch = 8
group_size = 4
staleness_bound = 1
lease_timeout_s = 10.0
first_samples = 0
checkpoint = {{ every_steps = 3, keep = 2 }}
retention = {{ keep_steps = 0 }}
"""

_REWARDS = '''
"""Rewards of the chaos runs. The model is untrained and answers nothing right, so rewards depend on its tokens."""

import os
import zlib

from palimpsest import Reward, Score


class Varied(Reward):
    """0 or 1, different within a group, so that every step changes the weights."""

    async def score(self, question, episode, trajectory):
        tokens = b"".join(context.token_ids.tobytes() for context in trajectory.contexts)
        return Score(float(zlib.crc32(tokens) % 2))


class Poisoned(Varied):
    """Kills the actor on one of {modulus} questions, and raises on another."""

    async def score(self, question, episode, trajectory):
        number = zlib.crc32(question.id.encode()) % {modulus}
        if number == {fatal}:
            os._exit(1)
        if number == {raising}:
            raise RuntimeError("poison")
        return await super().score(question, episode, trajectory)
'''


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome of one run. `problems` is empty if it reached its last step and its audit is clean."""

    seed: int
    seconds: float
    num_steps: int
    num_faults: int
    kinds: str
    problems: tuple[str, ...]


async def chaos_runs(*, num_runs: int, seed: int, num_steps: int, plan: RunPlan, out: Path | None) -> bool:
    """Runs them one after another; prints a line for each and a JSON summary. Returns whether all are without problems.

    out: the folder that keeps the runs; a temporary one if None
    """
    with ExitStack() as stack:
        root = out or Path(stack.enter_context(TemporaryDirectory(prefix="palimpsest-chaos-")))
        root = root.resolve()
        await _make_files(root / "files")
        results = []
        for number in range(seed, seed + num_runs):
            result = await _one_run(root / f"run-{number}", root / "files", seed=number, num_steps=num_steps, plan=plan)
            results.append(result)
            outcome = "ok" if not result.problems else f"PROBLEM: {'; '.join(result.problems)}"
            click.echo(
                f"chaos run {number}: {result.num_steps} steps in {result.seconds:.0f} s, {result.num_faults} faults "
                f"({result.kinds}): {outcome}"
            )
    num_bad = sum(bool(result.problems) for result in results)
    summary = {
        "num_runs": num_runs,
        "num_with_problems": num_bad,
        "num_faults": sum(result.num_faults for result in results),
        "seconds": sum(result.seconds for result in results),
        "runs": [asdict(result) for result in results],
    }
    click.echo(json.dumps(summary))
    return num_bad == 0


async def _one_run(folder: Path, files: Path, *, seed: int, num_steps: int, plan: RunPlan) -> RunResult:
    rng, started = random.Random(seed), time.monotonic()
    # About one run in three has each of these; a list of one kind means it.
    chosen = [kind for kind in plan.run_kinds if not plan.kinds or rng.random() < 1 / 3]
    config_path = _write_config(folder, files, seed=seed, num_steps=num_steps, is_poisoned="poison" in chosen)
    config = load_config(config_path)
    run = RunFolder(config.run.dir)
    lines: list[str] = []
    problems: list[str] = []
    launcher = await _launch(config_path)
    try:
        async with asyncio.timeout(_RUN_TIMEOUT_S):
            await _until(lambda: last_step(run.metrics) >= 0, launcher)
            if "orphan" in chosen:
                problems += await _orphan(run, launcher)
                launcher = await _launch(config_path)
                await _until(lambda: is_locked(run.launcher_lock) and run.processes.exists(), launcher)
            if plan.kinds:
                chaos = Chaos(
                    run.root, seed=seed, kinds=plan.kinds, roles=plan.roles, every_s=plan.every_s, echo=lines.append
                )
                if not await chaos.run(num_faults=plan.num_faults):
                    problems.append("fewer than two steps after the last fault")
            if status := await launcher.wait():
                problems.append(f"up ended with status {status}: {_tail(folder / 'up.log')}")
    except TimeoutError:
        problems.append(f"the run did not end in {_RUN_TIMEOUT_S:.0f} s")
    except _LauncherEnded:
        problems.append(f"up ended early: {_tail(folder / 'up.log')}")
    except PalimpsestError as error:
        problems.append(str(error))
    finally:
        await _stop(launcher)
        (folder / "chaos.log").write_text("\n".join(lines) + "\n")
    reached, audited = _audited(run.root)
    problems += audited
    if reached != num_steps or not is_finished(config):
        problems.append(f"the run must have {num_steps} steps, got {reached}")
    report = run.root / "chaos.json"
    counts = Counter(fault["kind"] for fault in json.loads(report.read_text())) if report.exists() else Counter()
    kinds = ", ".join([*(f"{count} {kind}" for kind, count in counts.items()), *chosen])
    num_faults = counts.total() + len(chosen)
    return RunResult(seed, time.monotonic() - started, reached, num_faults, kinds or "none", tuple(problems))


async def _orphan(run: RunFolder, launcher: asyncio.subprocess.Process) -> list[str]:
    """Stops the learner, kills its launcher, and waits until no process of the run is left. Returns problems."""
    pids = json.loads(run.processes.read_text())
    if "learner" in pids:
        os.kill(pids["learner"], signal.SIGSTOP)
    launcher.kill()
    await launcher.wait()
    left: list[str] = []
    try:
        async with asyncio.timeout(_ORPHAN_TIMEOUT_S):
            while left := [name for name, pid in pids.items() if _is_alive(pid)]:  # noqa: ASYNC110 (other processes)
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return [f"processes outlived their launcher: {left}"]
    return []


def _write_config(folder: Path, files: Path, *, seed: int, num_steps: int, is_poisoned: bool) -> Path:
    folder.mkdir(parents=True)
    numbers = {"modulus": 41, "fatal": seed % 41, "raising": (seed + 20) % 41}
    (folder / "chaos_rewards.py").write_text(_REWARDS.format(**numbers))
    path = folder / "run.toml"
    reward = "chaos_rewards:Poisoned" if is_poisoned else "chaos_rewards:Varied"
    path.write_text(_CONFIG.format(seed=seed, files=files, reward=reward, num_steps=num_steps))
    return path


async def _make_files(folder: Path) -> None:
    """Writes the toy world's corpus, its index and an untrained model, unless they exist."""
    if (folder / "model").is_dir():
        return
    data, index = folder / "data", folder / "index"
    await _run("actor.tasks.toy.command", "--out", str(data), "--world", "1", "--episodes", "1")
    corpus = str(data / "corpora" / "world-1.jsonl")
    await _run("learner.launch", "index", corpus, "--out", str(index), "--encoder", "bow", "--force")
    from transformers import AutoTokenizer

    from learner.warmstart.recipe import build_toy_model
    from protocol.atomic_write import atomic_path

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer", local_files_only=True)
    model = build_toy_model(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=0,
        hidden_size=16,
        num_layers=2,
    )
    with atomic_path(folder / "model") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


async def _run(module: str, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise PalimpsestError(f"{module} ended with status {process.returncode}: {output.decode()[-2000:]}")


class _LauncherEnded(Exception):
    pass


async def _launch(config: Path) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(config.parent), os.environ.get("PYTHONPATH", "")])}
    with (config.parent / "up.log").open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "learner.launch", "up", str(config), "--quiet"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )


async def _stop(launcher: asyncio.subprocess.Process) -> None:
    if launcher.returncode is None:
        launcher.terminate()
        await launcher.wait()


async def _until(condition: Callable[[], bool], launcher: asyncio.subprocess.Process) -> None:
    """Raises: _LauncherEnded."""
    while not condition():
        if launcher.returncode is not None:
            raise _LauncherEnded
        await asyncio.sleep(_POLL_S)


def _audited(run_dir: Path) -> tuple[int, list[str]]:
    """(number of steps, problems)"""
    try:
        audit = audit_run(run_dir)
    except PalimpsestError as error:
        return 0, [str(error)]
    return audit.num_steps, [f"audit: {problem}" for problem in audit.problems]


def _tail(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-5:])


def _is_alive(pid: int) -> bool:
    """False for a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
