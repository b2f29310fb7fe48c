"""What a config starts, what the live view says of its metrics, and how phases are timed over restarts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from learner.launch.plan import plan, with_ports
from learner.launch.stopwatch import Stopwatch
from learner.launch.view import Steps, View, rows, sparkline
from learner.metrics.jsonl import format_line, last_step, open_lines
from protocol.config import Config
from protocol.config_file import parse_config
from protocol.errors import ConfigError


def config(**sections: object) -> Config:
    tree: dict[str, object] = {"model": {"path": "/m"}, "task": {"kind": "toy", "worlds": [1]}, **sections}
    return parse_config(tree, source="test")


def test_ports_are_found_once_and_stay() -> None:
    found = with_ports(config(engine={"count": 3}, network={"control_port": 7001}))
    network = found.network
    named = [network.weights_port, network.announce_port, found.retriever.port, *found.engine.ports]
    assert network.control_port == 7001
    assert len(set(named)) == 6
    assert all(port > 1023 for port in named)
    assert with_ports(found) == found


def test_the_plan_names_every_process() -> None:
    wanted = config(
        engine={"count": 2, "urls": ["http://127.0.0.1:30000"]},
        actor={"count": 2},
        retriever={"indexes": {"a": "/i/a", "b": "/i/b"}},
        network={"keys": "/k"},
    )
    specs = plan(with_ports(wanted), config_path=Path("/r/config.json"))
    assert [(spec.name, spec.role) for spec in specs] == [
        ("learner", "learner"),
        ("retriever", "retriever"),
        ("engine-0", "engine"),
        ("engine-1", "engine"),
        ("sglang-0", "agent"),
        ("actor-0", "actor"),
        ("actor-1", "actor"),
    ]
    by_name = {spec.name: " ".join(spec.argv[1:]) for spec in specs}
    assert by_name["learner"] == "-m learner.launch learner /r/config.json"
    assert "retriever a=/i/a b=/i/b --address tcp://127.0.0.1:" in by_name["retriever"]
    assert by_name["retriever"].endswith("--keys /k")
    assert by_name["sglang-0"].endswith("--attach http://127.0.0.1:30000")
    assert len({argv.rpartition("--port ")[2] for name, argv in by_name.items() if name.startswith("engine")}) == 2


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"engine": {"count": 2, "ports": [1]}}, r"engine.ports must name 2 ports \(engine.count\), got 1"),
        ({"network": {"host": "203.0.113.7"}}, r"network.host '203.0.113.7' is no address of this machine"),
        ({"engine": {"urls": ["http://203.0.113.7:1"]}}, r"is beyond loopback and needs network.api_key_file"),
    ],
)
def test_plans_that_cannot_be(sections: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(with_ports(config(**sections)), config_path=Path("c"))


def line(step: int, reward: float) -> str:
    names = (
        "reward/em policy/entropy staleness/mean staleness/max rollout/tokens_per_s rollout/contexts "
        "rollout/context_tokens learner/tokens_per_s learner/step_s learner/publish_s learner/wait_s"
    )
    return json.dumps({"step": step, "reward/mean": reward, **dict.fromkeys(names.split(), 1.0)})


def test_steps_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = Steps(path)
    steps.refresh()
    assert steps.last is None
    with path.open("w", buffering=1) as file:
        file.write(line(0, 0.1) + "\n" + line(1, 0.2)[:20])
        file.flush()
        steps.refresh()
        assert sorted(steps.by_step) == [0]
        file.write(line(1, 0.2)[20:] + "\n" + line(1, 0.7) + "\n")
        file.flush()
        steps.refresh()
        assert sorted(steps.by_step) == [0, 1]
        assert steps.by_step[1]["reward/mean"] == 0.7


def test_a_step_whose_update_was_skipped_is_shown(tmp_path: Path) -> None:
    """Its entropy is not finite, which JSON cannot say; the run goes on, and so must the view."""
    path = tmp_path / "metrics.jsonl"
    written = format_line(json.loads(line(0, 0.1)) | {"policy/entropy": math.nan}, {"tokens_by_age": {0: 3}})
    assert "NaN" not in written
    path.write_text(written)
    steps = Steps(path)
    steps.refresh()
    assert steps.last is not None
    assert dict(rows(steps.last, bound=2))["reward"].endswith("entropy nan")


def test_the_view_shows_what_runs_and_what_it_learns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    view = View(
        title="my run",
        metrics=path,
        num_steps=10,
        staleness_bound=2,
        states=lambda: {"learner": ("running", 0), "actor-0": ("restarting", 3)},
        quiet=False,
    )
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(view.render())
    path.write_text(line(0, 0.25) + "\n" + line(1, 0.5) + "\n")
    view._steps.refresh()
    console.print(view.render())
    said = console.export_text()
    for text in (
        "waiting for the first batch",
        "actor-0 restarting (3 restarts)",
        "my run   step 2/10",
        "0.500",
        "at most 2",
    ):
        assert text in said
    console.file.close()


def test_a_sparkline_spans_zero_to_one() -> None:
    assert sparkline([], width=5) == ""
    assert sparkline([0.0, 0.5, 1.0], width=5) == "▁▅█"
    assert len(sparkline([0.1] * 1_000, width=60)) <= 60
    assert sparkline([-3.0, 4.0], width=5) == "▁█"


def test_seconds_add_up_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    path.write_text('{"rl_s": 100.0}')
    clock = Stopwatch(path)
    with pytest.raises(ZeroDivisionError), clock.lap("rl_s"):
        raise ZeroDivisionError
    with clock.lap("eval_s"):
        pass
    seconds = json.loads(path.read_text())
    assert seconds == clock.seconds
    assert 100.0 < seconds["rl_s"] < 101.0
    assert set(seconds) == {"rl_s", "eval_s"}


def test_a_line_that_a_killed_learner_tore_is_a_line_of_its_own(tmp_path: Path) -> None:
    """The next learner goes on in a new line, and whoever reads skips the torn one."""
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == -1
    path.write_text(line(0, 0.1) + "\n" + line(1, 0.2)[:20])
    assert last_step(path) == 0
    with open_lines(path) as lines:
        assert last_step(path) == 0
        lines.write(line(1, 0.3) + "\n")
    with open_lines(path) as lines:
        lines.write(line(2, 0.4) + "\n")
    steps = Steps(path)
    steps.refresh()
    assert sorted(steps.by_step) == [0, 1, 2]
    assert last_step(path) == 2
