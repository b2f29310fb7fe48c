"""TensorBoard's CUSTOM SCALARS tab, read back from the event files as TensorBoard's own plugin reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tensorboard import context as tensorboard_context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

from learner.metrics.catalogue import CATALOGUE, SECTIONS
from learner.metrics.layout import PAGES, custom_scalars, metric_name, tensorboard_tag
from learner.metrics.tensorboard import TensorBoardWriter
from protocol.metric import Metric

CHARTS = {chart: page for page, charts in PAGES.items() for chart in charts}


def shown_layout(folder: Path) -> dict[str, tuple[str, ...]]:
    """Page → titles of its charts, as the plugin sends them to the browser. `folder` has one subfolder per run."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    plugin = CustomScalarsPlugin(TBContext(data_provider=provider, logdir=str(folder), plugin_name_to_instance={}))
    layout = json.loads(str(plugin.layout_impl(tensorboard_context.RequestContext(), "")))
    return {page["title"]: tuple(chart["title"] for chart in page["chart"]) for page in layout["category"]}


def test_the_tab_has_five_pages_with_every_chart_once_although_the_run_was_resumed(tmp_path: Path) -> None:
    """Each life of the learner writes the layout into its own event file."""
    for step in (0, 3):
        writer = TensorBoardWriter(tmp_path / "run", purge_step=step)
        writer.scalars({"reward/mean": 0.5, "reward/std": 0.1, "reward/em": 0.4}, step=step)
        writer.close()
    shown = shown_layout(tmp_path)
    assert list(shown) == [
        "1 Is it learning",
        "2 How stale",
        "3 Who waits for whom",
        "4 Is the policy healthy",
        "5 What do the agents do",
    ]
    assert shown == PAGES


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_a_metric_is_in_its_chart_and_in_no_other(metric: Metric) -> None:
    tag = tensorboard_tag(metric.member("some_value"))
    charts = {title: patterns for page in custom_scalars().values() for title, (_, patterns) in page.items()}
    found = {title for title, patterns in charts.items() if any(re.match(pattern, tag) for pattern in patterns)}
    assert found == ({metric.chart} if metric.chart else set())


def test_the_pattern_of_a_family_excludes_metrics_that_are_declared_by_name() -> None:
    _, patterns = custom_scalars()["1 Is it learning"]["Reward and its parts"]
    for tag, is_shown in (
        ("1_reward/mean", True),
        ("1_reward/f1", True),
        ("1_reward/std_of_f1", True),
        ("1_reward/std", False),
        ("1_reward/zero_variance_fraction", False),
        ("4_rollout/mean", False),
    ):
        assert any(re.match(pattern, tag) for pattern in patterns) is is_shown, tag


def test_every_chart_of_a_metric_is_on_a_page() -> None:
    assert {each.chart for each in CATALOGUE if each.chart} == set(CHARTS)
    assert len(CHARTS) == sum(map(len, PAGES.values())), "a chart is on two pages"
    assert all(each.kind == "scalar" for each in CATALOGUE if each.chart)


@pytest.mark.parametrize("name", ["reward/mean", "engine/updates", "trajectories/best", "other/x", "1_a", "x"])
def test_a_tag_can_be_turned_back_into_the_name(name: str) -> None:
    assert metric_name(tensorboard_tag(name)) == name


def test_sections_are_sorted_by_importance_in_tensorboard() -> None:
    tags = sorted(tensorboard_tag(metric.name) for metric in CATALOGUE)
    shown = list(dict.fromkeys(tag.partition("/")[0] for tag in tags))
    assert shown == [f"{number}_{section}" for number, section in enumerate(SECTIONS, start=1)]
    assert shown[:2] == ["1_reward", "2_staleness"]
    assert {metric.section for metric in CATALOGUE} == set(SECTIONS)
