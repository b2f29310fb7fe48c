"""The group of the network benchmarks: 8 trajectories of 4 contexts, 38,697 tokens, 202 KB on the wire."""

from __future__ import annotations

import numpy as np

from protocol.types import Context, Question, Trajectory, TrajectoryGroup, VersionSpan

NUM_TRAJECTORIES, NUM_CONTEXTS, NUM_TOKENS = 8, 4, 38_697
VOCABULARY = 151_936
RUN = "benchmark"
PUBLICATION = 1


def make_group(*, seed: int = 0) -> TrajectoryGroup:
    """Makes contexts of about equal length, each with two spans sampled by version 0 (publication 1)."""
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, NUM_TOKENS, NUM_TRAJECTORIES * NUM_CONTEXTS + 1).astype(int)
    contexts = [_context(rng, int(length)) for length in np.diff(edges)]
    trajectories = tuple(
        Trajectory(
            contexts=tuple(contexts[i * NUM_CONTEXTS : (i + 1) * NUM_CONTEXTS]),
            reward=float(i % 2),
            reward_parts={"em": float(i % 2), "f1": 0.5},
            stats={"num_searches": 3.0, "num_turns": 4.0},
            answer="a short answer",
        )
        for i in range(NUM_TRAJECTORIES)
    )
    question = Question(id="q0", text="Which of the two was written first?", answers=("the other",))
    return TrajectoryGroup(RUN, 0, 0, question, trajectories)


def _context(rng: np.random.Generator, length: int) -> Context:
    mask = np.zeros(length, dtype=np.bool_)
    spans = tuple(VersionSpan(length * a // 10, length * b // 10, 0, PUBLICATION) for a, b in ((3, 4), (8, 10)))
    for span in spans:
        mask[span.start : span.end] = True
    logprobs = np.where(mask, -rng.random(length), 0).astype(np.float32)
    return Context(rng.integers(0, VOCABULARY, length, dtype=np.int32), mask, logprobs, spans, role="memory-manager")
