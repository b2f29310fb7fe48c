"""The scheduler keeps its bounds and the order of arrival under any sequence of calls, and rows stay dense."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actor.engine.scheduler import Scheduler, Step
from actor.engine.sequence import Sampling, Sequence

MAX_RUNNING, MAX_TOKENS, MAX_PREFILL = 4, 60, 30


def sequence(rid: int, *, num_prompt: int, num_new: int) -> Sequence:
    sampling = Sampling(
        temperature=1.0,
        greedy=False,
        top_p=1.0,
        top_k=None,
        max_new_tokens=num_new,
        min_new_tokens=0,
        stop_token_ids=frozenset(),
        stop_strings=(),
        skip_special_tokens=True,
        no_stop_trim=False,
        seed=0,
    )
    return Sequence(str(rid), [1] * num_prompt, sampling, True)


class Rows:
    """A model of the cache: for each row, the sequence and the number of its tokens."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[str, int]] = {}

    def run(self, step: Step) -> None:
        for source, target in step.moves:
            self.held[target] = self.held[source]
        for row, s in enumerate(step.decode):
            assert self.held[row] == (s.rid, s.num_tokens - 1)
            self.held[row] = (s.rid, s.num_tokens)
        for row, s in enumerate(step.prefill, start=len(step.decode)):
            self.held[row] = (s.rid, s.num_tokens)
        for s in step.decode + step.prefill:
            s.record(token_id=1, logprob=0.0, version="v")


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 20)),
        st.tuples(st.sampled_from(["step", "step", "step", "retract", "pause", "resume", "hold", "end_hold"])),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    max_size=80,
)


@given(actions)
def test_bounds_order_and_rows_hold_under_any_calls(script: list[tuple]) -> None:
    scheduler = Scheduler(max_running_requests=MAX_RUNNING, max_total_tokens=MAX_TOKENS, max_prefill_tokens=MAX_PREFILL)
    rows, everything, started = Rows(), [], []

    def step() -> None:
        ready = scheduler.next_step()
        if ready is None:
            return
        assert list(ready.decode + ready.prefill) == scheduler.running
        assert len(scheduler.running) <= MAX_RUNNING
        assert sum(s.num_reserved_tokens for s in scheduler.running) <= MAX_TOKENS
        if len(ready.prefill) > 1:
            assert len(ready.prefill) * max(s.num_tokens for s in ready.prefill) <= MAX_PREFILL
        started.extend(int(s.rid) for s in ready.prefill if s.num_retractions == 0)
        rows.run(ready)

    for name, *values in script:
        match name:
            case "add":
                everything.append(sequence(len(everything), num_prompt=values[0], num_new=values[1]))
                scheduler.add(everything[-1])
            case "step":
                step()
            case "retract":
                alive = [s for s in scheduler.running if s.finish is None]
                queued = list(scheduler.waiting)
                assert scheduler.retract() == len(alive)
                assert list(scheduler.waiting) == alive + queued
                assert not scheduler.running
            case "pause":
                scheduler.pause()
            case "resume":
                scheduler.resume()
            case "hold":
                scheduler.hold()
            case "end_hold":
                scheduler.end_hold()
            case "abort" if values[0] < len(everything):
                everything[values[0]].abort("cancelled")
                scheduler.drop_finished()
    scheduler.resume()
    scheduler.end_hold()
    for _ in range(20 * (len(everything) + 1)):
        step()
    assert all(s.finish is not None for s in everything)
    assert scheduler.is_drained
    assert not list(scheduler.in_flight())
    assert started == sorted(started)


def test_paused_and_held_sequences_do_not_start() -> None:
    scheduler = Scheduler(max_running_requests=MAX_RUNNING, max_total_tokens=MAX_TOKENS, max_prefill_tokens=MAX_PREFILL)
    scheduler.hold()
    scheduler.add(sequence(0, num_prompt=1, num_new=1))
    assert scheduler.is_drained
    assert scheduler.next_step() is None
    scheduler.pause()
    scheduler.end_hold()
    assert scheduler.next_step() is None
    scheduler.resume()
    step = scheduler.next_step()
    assert step is not None
    assert [s.rid for s in step.prefill] == ["0"]
