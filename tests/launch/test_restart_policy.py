"""The restart rule as tables: when the error of a process stops the run, and the pauses before restarts."""

from __future__ import annotations

import pytest

from learner.launch.restart_policy import RestartPolicy, RestartState, decide

POLICY = RestartPolicy(max_restarts=2, patience_s=100.0)
KILLED, CRASH, USER_ERROR, TRAINING_STOPPED = -9, 1, 2, 3

Failure = tuple[float, float, int, int]
"""(time, uptime in seconds, the run's newest step, exit status)"""


def failed(role: str, *failures: Failure, policy: RestartPolicy = POLICY) -> RestartState:
    state = RestartState(policy, role)
    for now_s, uptime_s, newest_step, status in failures:
        state.record_failure(status=status, uptime_s=uptime_s, newest_step=newest_step, now_s=now_s)
    return state


def crashes(*times: float, step: int = 4, uptime_s: float = 1.0) -> list[Failure]:
    return [(time, uptime_s, step, CRASH) for time in times]


LEARNER = {
    "three quick crashes in one step": (crashes(0, 1, 2), "stop"),
    "two quick crashes": (crashes(0, 1), "restart"),
    "dies after 600 s each time": (crashes(600, 1200, 1800, uptime_s=600.0), "stop"),
    "dies after an hour each time": (crashes(3600, 7200, 10800, uptime_s=3600.0), "stop"),
    "a step before the last crash": ([*crashes(0, 1), (2, 1, 5, CRASH)], "restart"),
    "an older step after a resume is no progress": ([*crashes(0, 1), (2, 1, 3, CRASH)], "stop"),
    "one step per life, without end": ([(i, 1, i, CRASH) for i in range(20)], "restart"),
    "killed once": ([(0, 1, 4, KILLED)], "restart"),
    "a user error at the first start": ([(0, 1, -1, USER_ERROR)], "stop"),
    "one user error after a kill": ([(0, 1, 4, KILLED), (1, 1, 4, USER_ERROR)], "restart"),
    "two user errors after a kill": ([(0, 1, 4, KILLED), (1, 1, 4, USER_ERROR), (2, 1, 4, USER_ERROR)], "stop"),
    "training cannot continue": ([(0, 1, 4, KILLED), (1, 1, 4, TRAINING_STOPPED)], "stop"),
}


@pytest.mark.parametrize(("failures", "wanted"), LEARNER.values(), ids=LEARNER.keys())
def test_learner(failures: list[Failure], wanted: str) -> None:
    now_s, _, step, status = failures[-1]
    state = failed("learner", *failures)
    assert decide(state, status=status, others=[], newest_step=step, now_s=now_s) == wanted


ACTORS = {
    "quick crashes of the only actor within one long step": (crashes(*range(6)), [], "restart"),
    "the only actor, for longer than the patience": (crashes(*range(6), 100), [], "stop"),
    "one actor, while another works": (crashes(*range(6), 100), [[]], "restart"),
    "one actor, while another has crashed once": (crashes(*range(6), 100), [crashes(50)], "restart"),
    "all actors": (crashes(*range(6), 100), [crashes(0, 1, 2), crashes(0, 1, 2)], "stop"),
    "all actors, but the run made a step since": (
        [(0, 1, 4, CRASH), (1, 1, 4, CRASH), (2, 1, 5, CRASH), (3, 1, 5, CRASH), (103, 1, 5, CRASH)],
        [crashes(0, 1, 2)],
        "restart",
    ),
    "long uptimes do not count as progress": (crashes(0, 700, 1400, uptime_s=700.0), [], "stop"),
    "a user error at the first start": ([(0, 1, 4, USER_ERROR)], [[]], "stop"),
}


@pytest.mark.parametrize(("failures", "others", "wanted"), ACTORS.values(), ids=ACTORS.keys())
def test_actors(failures: list[Failure], others: list[list[Failure]], wanted: str) -> None:
    now_s, _, step, status = failures[-1]
    state, rest = failed("actor", *failures), [failed("actor", *other) for other in others]
    assert decide(state, status=status, others=rest, newest_step=step, now_s=now_s) == wanted


def test_the_pause_is_bounded_and_reset_by_a_long_uptime() -> None:
    policy = RestartPolicy(base_pause_s=0.25, short_uptime_s=10.0, max_pause_s=15.0, max_pause_after_kill_s=2.0)
    nine = crashes(*range(9))
    assert failed("actor", (0, 11.0, 0, CRASH), policy=policy).pause_s(was_killed=False) == 0.5
    assert failed("actor", *nine[:1], policy=policy).pause_s(was_killed=False) == 1.0
    assert failed("actor", *nine, policy=policy).pause_s(was_killed=False) == 15.0
    assert failed("actor", *nine, policy=policy).pause_s(was_killed=True) == 2.0
    assert failed("actor", *nine, (9, 11.0, 0, CRASH), policy=policy).pause_s(was_killed=False) == 0.5
