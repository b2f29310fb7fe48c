"""The code of docs/extending.md, in a package outside the repository, is used in runs by import paths only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SKELETON = ROOT / "learner" / "launch" / "skeleton"
MAX_AGENT_LINES = 80


def blocks() -> dict[str, str]:
    """File name → content of the fenced blocks that name a file."""
    return dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


def unnamed_toml() -> str:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return text


def palimpsest(*arguments: str | Path, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("palimpsest")), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=240)


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the agent folder that `palimpsest init` wrote."""
    folder = tmp_path_factory.mktemp("init") / "my-agent"
    done = palimpsest("init", folder, path=folder.parent, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def agent(skeleton: Path, tmp_path: Path) -> Path:
    """Returns a copy of the agent folder."""
    return shutil.copytree(skeleton, tmp_path / "my-agent")


def test_the_guide_shows_what_init_writes() -> None:
    for name in ("agent.py", "run.toml"):
        assert blocks()[name] == (SKELETON / name).read_text(encoding="utf-8")


def test_the_agent_of_the_guide_is_short() -> None:
    code = [line for line in blocks()["agent.py"].splitlines() if line.strip()]
    assert len(code) <= MAX_AGENT_LINES


def test_an_agent_outside_the_repository_trains_three_steps(agent: Path, tmp_path: Path) -> None:
    done = palimpsest("up", agent / "run.toml", "--set", "learner.num_steps=3", path=agent, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = agent / "runs" / "my-agent"
    steps = steps_of(run)
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert {"reward/right", "reward/remembered"} <= steps[0].keys()
    assert steps[0]["rollout/num_tool_calls"] == 1.0
    assert all(step["learner/grad_norm"] > 0 for step in steps)
    assert palimpsest("audit", run, path=tmp_path, cwd=tmp_path).returncode == 0


def test_a_loss_an_estimator_and_a_correction_outside_the_repository_train_three_steps(
    agent: Path, tmp_path: Path
) -> None:
    (agent / "algorithms.py").write_text(blocks()["algorithms.py"])
    text = blocks()["run.toml"]
    before, rest = text.split("[learner.advantage]")
    (agent / "run.toml").write_text(
        before + unnamed_toml() + "\n[learner.optimizer]" + rest.split("[learner.optimizer]")[1]
    )
    done = palimpsest("up", agent / "run.toml", "--set", "learner.num_steps=3", path=agent, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = agent / "runs" / "my-agent"
    steps = steps_of(run)
    assert len(steps) == 3
    assert any(step["learner/advantage_mean"] != pytest.approx(0.0, abs=1e-6) for step in steps)
    config = json.loads((run / "config.json").read_text())["learner"]
    assert (config["advantage"]["scale"], config["loss"]["width"]) == (2.0, 0.3)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "workflow.use=agent:MyWorkfow",
            "agent:MyWorkfow cannot be imported: its module has no 'MyWorkfow'; did you mean",
        ),
        ("reward.use=nowhere:Reward", "nowhere:Reward cannot be imported: there is no module 'nowhere'"),
        ("task.use=agent:MyTool", "agent:MyTool has no method def question(self, cursor) -> Question"),
        ("workflow.action_tokens=0", "workflow.action_tokens: must be >= 1, got 0"),
        ("workflow.actoin_tokens=1", "workflow.actoin_tokens: unknown key; did you mean 'action_tokens'"),
        ("learner.loss.use=agent:Loss", "agent:Loss cannot be imported: its module has no 'Loss'"),
        ("workflow.tools=['lookup']", "needs the tool 'lookup', but no [[tool]] has this name"),
    ],
)
def test_an_invalid_extension_is_refused_with_one_sentence_before_any_role_starts(
    agent: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    done = palimpsest("up", agent / "run.toml", "--set", override, path=agent, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert sentence in line
    logs = {path.name for path in (agent / "runs" / "my-agent" / "logs").iterdir()}
    assert logs <= {"check-actor.log", "check-learner.log"}


@pytest.mark.slow
def test_an_error_in_an_episode_fails_the_trajectory_and_the_actor_continues(agent: Path, tmp_path: Path) -> None:
    """The reward raises for about one trajectory in four; the run completes, and the failures are counted."""
    code = blocks()["agent.py"].replace(
        "        right = float(",
        "        if len(episode.answer or '') % 4 == 0:\n            raise KeyError('judge')\n        right = float(",
    )
    (agent / "agent.py").write_text(code)
    done = palimpsest("up", agent / "run.toml", "--set", "learner.num_steps=3", path=agent, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = agent / "runs" / "my-agent"
    last = steps_of(run)[-1]
    assert last["actor/trajectories_failed"] == last["actor/failed_reward_KeyError"] > 0
    log = (run / "logs" / "actor-0.log").read_text()
    assert "trajectory failed: agent:MyReward raised KeyError: 'judge' (agent.py, line" in log
    assert "Traceback" in log


@pytest.mark.slow
def test_an_error_in_a_loss_stops_the_run_with_one_sentence(agent: Path, tmp_path: Path) -> None:
    (agent / "broken.py").write_text(
        "from palimpsest import PolicyLoss\n\n\nclass Broken(PolicyLoss):\n    def __call__(self, tokens):\n"
        "        return tokens.log_ratio.sum(), tokens.log_ratio > 0\n"
    )
    arguments = ("up", agent / "run.toml", "--set", "learner.loss={use='broken:Broken'}")
    done = palimpsest(*arguments, path=agent, cwd=tmp_path)
    assert done.returncode == 3
    assert "the policy loss broken:Broken raised ValueError: a policy loss must return loss and clipped" in done.stderr


def test_the_example_is_complete_and_starts(tmp_path: Path) -> None:
    example = ROOT / "examples" / "own_agent"
    arguments = ("up", example / "run.toml", "--set", "learner.num_steps=2", "--set", f"run.dir={tmp_path / 'run'}")
    done = palimpsest(*arguments, path=example, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(steps_of(tmp_path / "run")) == 2


def test_importing_palimpsest_loads_no_torch_and_offers_every_name() -> None:
    code = (
        "import sys, palimpsest\n"
        "assert not {'torch', 'actor', 'learner'} & sys.modules.keys()\n"
        "actor = [n for n in palimpsest.__all__ if palimpsest._MODULE_OF[n].startswith(('actor', 'protocol'))]\n"
        "[getattr(palimpsest, n) for n in actor]\n"
        "assert 'torch' not in sys.modules\n"
        "[getattr(palimpsest, n) for n in palimpsest.__all__]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
