"""Makes the pictures in docs/images from the folder of a run: the live view, and the five pages of TensorBoard.

    python docs/screenshots.py RUN live-view      # while RUN is running: docs/images/live-view-{80,160}.png
    python docs/screenshots.py RUN tensorboard    # docs/images/tensorboard-{1..5}.png

It needs Chromium and, in this environment, the package `playwright`, which is not a dependency of Palimpsest.
CHROMIUM names the browser's program; the default is `chromium`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from learner.launch.live_view import LiveView, render
from learner.launch.view_text import States
from learner.metrics.layout import PAGES
from learner.store.run_folder import RunFolder

IMAGES = Path(__file__).parent / "images"
LIVE_VIEW_COLUMNS = (80, 160)
CHART_TIMEOUT_MS = 120_000


def main() -> None:
    run_dir, what = Path(sys.argv[1]), sys.argv[2]
    IMAGES.mkdir(exist_ok=True)
    with _browser() as browser:
        if what == "live-view":
            _live_view(browser, run_dir)
        else:
            _tensorboard(browser, RunFolder(run_dir).tensorboard)


def _live_view(browser: Any, run_dir: Path) -> None:
    """What `LiveView` shows of the run now, at each width. The processes are those in RUN/processes.json."""
    config = json.loads(RunFolder(run_dir).config.read_text())
    processes = json.loads(RunFolder(run_dir).processes.read_text())
    states: States = dict.fromkeys(processes, ("running", 0))
    view = LiveView(
        title=config["run"]["name"],
        run_dir=run_dir,
        num_steps=config["learner"]["num_steps"],
        staleness_bound=config["learner"]["staleness_bound"],
        states=lambda: states,
    )
    elapsed_s = time.time() - RunFolder(run_dir).launcher_lock.stat().st_mtime
    status = replace(view.status(), elapsed_s=elapsed_s)
    for columns in LIVE_VIEW_COLUMNS:
        console = Console(width=columns, record=True, file=io.StringIO(), force_terminal=True)
        console.print(render(status))
        page = browser.new_page(viewport={"width": 12 * columns + 40, "height": 1000}, device_scale_factor=1)
        page.set_content(console.export_svg(title=f"{columns} columns"))
        page.locator("svg").first.screenshot(path=str(IMAGES / f"live-view-{columns}.png"))
        page.close()


def _tensorboard(browser: Any, folder: Path) -> None:
    """Each page of the CUSTOM SCALARS tab, with the legends of its charts open."""
    with _served(folder) as address:
        page = browser.new_page(viewport={"width": 1500, "height": 6000})
        page.goto(f"{address}/#custom_scalars")
        page.get_by_text("Ignore outliers in chart scaling").click(timeout=CHART_TIMEOUT_MS)
        for number, (title, charts) in enumerate(PAGES.items(), start=1):
            pane = page.locator("tf-category-paginated-view", has=page.get_by_text(title, exact=True))
            pane.scroll_into_view_if_needed(timeout=CHART_TIMEOUT_MS)
            cards = pane.locator("tf-custom-scalar-multi-line-chart-card")
            assert cards.count() == len(charts), f"{title}: {cards.count()} charts are shown, not {len(charts)}"
            for i in range(cards.count()):
                cards.nth(i).get_by_text(re.compile(r"Matches \([1-9]")).wait_for(timeout=CHART_TIMEOUT_MS)
                cards.nth(i).locator(".toggle-matches-button").click()
            page.wait_for_load_state("networkidle")
            pane.screenshot(path=str(IMAGES / f"tensorboard-{number}.png"))


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Runs TensorBoard on loopback; yields its address."""
    program = str(Path(sys.executable).with_name("tensorboard"))
    with tempfile.TemporaryDirectory() as data:
        os.symlink(folder.resolve(), Path(data) / "run")
        argv = [program, "--logdir", data, "--host", "127.0.0.1", "--port", "0"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                        yield found[0]
                        return
                raise RuntimeError("TensorBoard did not start")
            finally:
                process.terminate()


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    program = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    main()
