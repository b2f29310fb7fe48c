"""The scheduler keeps its bounds and the order of arrival under any sequence of calls, and rows stay dense."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actor.engine.scheduler import Scheduler, Step
from actor.engine.sequence import Sampling, Sequence

MAX_RUNNING, MAX_TOKENS, MAX_PREFILL = 4, 60, 30


def sequence(rid: int, *, prompt: list[int], num_new: int) -> Sequence:
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
    return Sequence(str(rid), prompt, sampling, True)


class Rows:
    """A model of the cache: the tokens whose keys and values each row holds, each with the version of its weights."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[tuple[int, int]]] = {}
        self.weights = 0

    def run(self, step: Step) -> None:
        for kind, length in ((step.saves, step.save_length), (step.moves, 1_000), (step.loads, 1_000)):
            copied = {target: self.tokens[source][:length] for source, target in kind}
            assert len(copied) == len(kind), "targets are distinct"
            self.tokens |= copied
        for row, s in enumerate(step.decode):
            assert [token for token, _ in self.tokens[row]] == s.tokens[:-1]
            self.tokens[row] = [*self.tokens[row], (s.tokens[-1], self.weights)]
        rows = enumerate(zip(step.prefill, step.prefix_lengths, strict=True), start=len(step.decode))
        for row, (s, prefix) in rows:
            assert 0 <= prefix < s.num_tokens
            known = self.tokens[row][:prefix] if prefix else []
            assert known == [(token, self.weights) for token in s.tokens[:prefix]], "of the same tokens and weights"
            self.tokens[row] = [(token, self.weights) for token in s.tokens]
        for i, s in enumerate(step.decode + step.prefill):
            s.record(token_id=i % 2, logprob=0.0, version="v")


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 20)),
        st.tuples(st.just("continue"), st.integers(0, 30), st.integers(1, 5)),
        st.tuples(
            st.sampled_from(["step", "step", "step", "retract", "pause", "resume", "hold", "end_hold", "update"])
        ),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    max_size=80,
)


@given(actions, st.sampled_from([0, 1, 5]))
def test_bounds_order_and_rows_hold_under_any_calls(script: list[tuple], num_saved_rows: int) -> None:
    scheduler = Scheduler(
        max_running_requests=MAX_RUNNING,
        max_total_tokens=MAX_TOKENS,
        max_prefill_tokens=MAX_PREFILL,
        num_saved_rows=num_saved_rows,
    )
    rows, everything, started = Rows(), [], []

    def step() -> None:
        ready = scheduler.next_step()
        if ready is None:
            return
        assert list(ready.decode + ready.prefill) == scheduler.running
        assert len(scheduler.running) <= MAX_RUNNING
        assert sum(s.num_reserved_tokens for s in scheduler.running) <= MAX_TOKENS
        if len(ready.prefill) > 1:
            computed = [s.num_tokens - p for s, p in zip(ready.prefill, ready.prefix_lengths, strict=True)]
            assert len(computed) * max(computed) <= MAX_PREFILL
        started.extend(int(s.rid) for s in ready.prefill if s.num_retractions == 0)
        rows.run(ready)

    for name, *values in script:
        match name:
            case "add":
                everything.append(sequence(len(everything), prompt=values[0], num_new=values[1]))
                scheduler.add(everything[-1])
            case "continue" if values[0] < len(everything):
                prompt = [*everything[values[0]].tokens, 1]
                if len(prompt) + values[1] <= MAX_TOKENS:
                    everything.append(sequence(len(everything), prompt=prompt, num_new=values[1]))
                    scheduler.add(everything[-1])
            case "update":
                rows.weights += 1
                scheduler.forget_prefixes()
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
    if not num_saved_rows:  # otherwise a sequence may wait one step for the prefix that another one computes
        assert started == sorted(started)


def test_paused_and_held_sequences_do_not_start() -> None:
    scheduler = Scheduler(max_running_requests=MAX_RUNNING, max_total_tokens=MAX_TOKENS, max_prefill_tokens=MAX_PREFILL)
    scheduler.hold()
    scheduler.add(sequence(0, prompt=[1], num_new=1))
    assert scheduler.is_drained
    assert scheduler.next_step() is None
    scheduler.pause()
    scheduler.end_hold()
    assert scheduler.next_step() is None
    scheduler.resume()
    step = scheduler.next_step()
    assert step is not None
    assert [s.rid for s in step.prefill] == ["0"]


def test_sequences_with_a_shared_prompt_compute_it_once() -> None:
    scheduler = Scheduler(max_running_requests=4, max_total_tokens=400, max_prefill_tokens=400, num_saved_rows=4)
    prompt, rows = list(range(20)), Rows()
    for rid in range(3):
        scheduler.add(sequence(rid, prompt=[*prompt, 30 + rid], num_new=5))
    computed = []
    for _ in range(2):
        step = scheduler.next_step()
        assert step is not None
        computed.append([(s.rid, s.num_tokens - p) for s, p in zip(step.prefill, step.prefix_lengths, strict=True)])
        rows.run(step)
    assert computed == [[("0", 21)], [("1", 1), ("2", 1)]]
