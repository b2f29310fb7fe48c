"""The texts of the live view: remaining time, durations, processes, the curve of rewards."""

from __future__ import annotations

from collections.abc import Mapping

from learner.launch.view_text import duration, process_text, remaining_s, sparkline


def test_the_remaining_time_is_the_median_pace_of_the_last_steps() -> None:
    times = [0.0, 2.0, 4.0, 600.0, 602.0]  # a restart between steps 2 and 3
    steps: Mapping[int, Mapping[str, float]] = {i: {"time": time} for i, time in enumerate(times)}
    assert remaining_s(steps, num_steps=15) == 20.0
    assert remaining_s(steps, num_steps=5) == 0.0
    assert remaining_s({0: {"time": 5.0}}, num_steps=5) is None
    assert remaining_s({}, num_steps=5) is None
    fast = {i: {"time": 100.0 * i if i < 100 else 9_900.0 + (i - 99)} for i in range(130)}
    assert remaining_s(fast, num_steps=140) == 10.0


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 7.4, 61, 3_599.6, 36_061)] == [
        "0:00",
        "0:07",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]


def test_many_processes_are_counted() -> None:
    text = process_text({f"actor-{i}": ("running", int(i == 40)) for i in range(64)})
    assert text.startswith("actor-40 running (1 restarts); running: actor-0, actor-1, ")
    assert text.endswith(" and 51 more")


def test_a_sparkline_spans_zero_to_one() -> None:
    assert sparkline([], width=5) == ""
    assert sparkline([0.0, 0.5, 1.0], width=5) == "▁▅█"
    assert len(sparkline([0.1] * 1_000, width=60)) <= 60
    assert sparkline([-3.0, 4.0], width=5) == "▁█"
