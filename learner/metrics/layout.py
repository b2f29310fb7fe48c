"""TensorBoard's layout: the pages and charts of the CUSTOM SCALARS tab, and the tag of each metric.

A metric is in the chart that its declaration names (`Metric.chart`). The page of a chart is declared here.
"""

from __future__ import annotations

import re

from learner.metrics.catalogue import CATALOGUE, SECTIONS
from protocol.metric import Metric

PAGES: dict[str, tuple[str, ...]] = {
    "1 Is it learning": (
        "Reward and its parts",
        "Groups without a signal",
        "Spread of rewards",
        "Mean advantage",
        "Learning rate",
        "Trained tokens of a step",
    ),
    "2 How stale": (
        "Age of trained tokens in steps",
        "KL to the behaviour policy by age",
        "Tokens over the bound",
    ),
    "3 Who waits for whom": (
        "Seconds of a step: wait, train, publish",
        "Groups running and buffered",
        "Tokens per second",
        "Trajectories and their engine requests",
        "Actors and engines",
        "Weight updates of engines",
        "Groups to lease again",
        "Leases expired, groups refused",
        "Questions skipped",
    ),
    "4 Is the policy healthy": (
        "Entropy",
        "KL to the behaviour policy and the reference",
        "Importance weights",
        "Effective sample fraction",
        "Clipped and masked tokens",
        "Gradient norm",
        "Skipped updates",
    ),
    "5 What do the agents do": (
        "Contexts, turns and searches",
        "Context lengths in tokens",
        "Tokens of a trajectory",
        "How trajectories end",
        "Mistakes of a trajectory",
        "Failed trajectories by kind",
    ),
}
"""Page → its charts, in the order of TensorBoard."""


def tensorboard_tag(name: str) -> str:
    """The tag of the metric `name` in TensorBoard, which sorts tags by name: `reward/mean` → `1_reward/mean`."""
    return _prefix(name) + name


def metric_name(tag: str) -> str:
    """The inverse of `tensorboard_tag`."""
    number, _, name = tag.partition("_")
    return name if number and tag == tensorboard_tag(name) else tag


def custom_scalars() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """The layout in the form that `SummaryWriter.add_custom_scalars` takes: page → chart → (kind, patterns of tags)."""
    return {
        page: {chart: ("Multiline", [_pattern(each) for each in CATALOGUE if each.chart == chart]) for chart in charts}
        for page, charts in PAGES.items()
    }


def _pattern(metric: Metric) -> str:
    """A regular expression for the metric's tags. The one of a family excludes the names that are declared themselves.

    TensorBoard matches only the start of a tag (`re.match`), so the pattern ends with `$`.
    """
    pattern = metric.pattern(_prefix(metric.name))
    own = [each.name for each in CATALOGUE if each is not metric and not each.is_family and metric.matches(each.name)]
    excluded = "".join(f"(?!{re.escape(tensorboard_tag(name))}$)" for name in own)
    return f"{excluded}{pattern}$"


def _prefix(name: str) -> str:
    section = name.partition("/")[0]
    return f"{SECTIONS.index(section) + 1}_" if section in SECTIONS else ""
