"""The declarations of all metrics of a run. `learner.metrics.document` generates docs/metrics.md from them.

    declarations                          module, which also computes the values (step_catalogue: step_metrics does)
    reward/, rollout/                     rollout_metrics
    staleness/, learner/                  step_catalogue; loop_metrics for those that the loop and the writer measure
    policy/, the losses in learner/       learner.algorithms.token_metrics
    queue/, actor/, engine/               peer_metrics; coordinator, actors and weight agents compute the values

To add a metric of the trained tokens, add one entry to `TOKEN_METRICS`. To add another metric, add its declaration and
the line that computes its value; tests fail for a tag without a declaration and for a declaration without a tag. A
metric with a `chart` is shown by that chart of TensorBoard's CUSTOM SCALARS tab (layout.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from learner.algorithms.token_metrics import TOKEN_METRICS
from learner.metrics.loop_metrics import LOOP_METRICS
from learner.metrics.peer_metrics import ACTOR_METRICS, ENGINE_METRICS, QUEUE_METRICS
from learner.metrics.rollout_metrics import REWARD_METRICS, ROLLOUT_METRICS
from learner.metrics.step_catalogue import STALENESS_METRICS, STEP_METRICS
from protocol.metric import Metric

SECTIONS = ("reward", "staleness", "policy", "rollout", "learner", "queue", "actor", "engine", "trajectories")
"""The first parts of all names, by importance: the order in docs/metrics.md and in TensorBoard."""

CATALOGUE: tuple[Metric, ...] = (
    *REWARD_METRICS,
    *STALENESS_METRICS,
    *TOKEN_METRICS,
    *ROLLOUT_METRICS,
    *STEP_METRICS,
    *LOOP_METRICS,
    *QUEUE_METRICS,
    *ACTOR_METRICS,
    *ENGINE_METRICS,
)


def undeclared(tags: Iterable[str]) -> set[str]:
    """The tags that match no declaration."""
    return {tag for tag in tags if not any(metric.matches(tag) for metric in CATALOGUE)}


def missing(tags: Iterable[str], *, sections: Iterable[str]) -> set[str]:
    """The declared names in `sections` that every step must have, but that no tag matches."""
    tags, sections = set(tags), set(sections)
    return {
        metric.name
        for metric in CATALOGUE
        if metric.section in sections and not metric.absent_if and not any(map(metric.matches, tags))
    }
