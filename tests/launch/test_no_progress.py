"""A run that cannot make progress ends with the most frequent reason, and is not restarted. Processes are real."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from learner.metrics.progress import Progress, progress_lines
from learner.store.run_folder import RunFolder
from tests.launch.running import RUN_TIMEOUT_S, launched
from tests.launch.tiny_run import TinyRun, make_tiny_run

_ASKER = '''
from palimpsest import Episode, Workflow


class Asker(Workflow):
    """Samples one token, then searches for it."""

    async def run(self, question, session):
        session.open_context([7, 8])
        await session.generate(1)
        (tool,) = self.tools.values()
        await session.call(tool, {"query": "anyone"})
        return Episode(answer="nobody")
'''


def ended_run(folder: Path, workflow: str, **settings: object) -> tuple[TinyRun, str]:
    """Runs a tiny run with the `[workflow]` section `workflow` until it ends with status 3; returns its output."""
    run = make_tiny_run(folder)
    config = run.config.read_text()
    start, end = config.index("[workflow]"), config.index("[actor]")
    run.config.write_text(f"{config[:start]}{workflow}\n{config[end:]}")
    (folder / "asker.py").write_text(_ASKER)
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    log = folder / "up.log"
    with launched("up", run.config, *overrides, log=log, environment={"PYTHONPATH": str(folder)}) as process:
        assert process.wait(timeout=RUN_TIMEOUT_S) == 3, log.read_text()
    return run, log.read_text()


@pytest.mark.slow
def test_a_run_whose_retriever_does_not_answer_ends_with_the_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        run, output = ended_run(
            tmp_path,
            '[workflow]\nuse = "asker:Asker"\ncontext_tokens = 96\ntools = ["search"]',
            retriever__indexes="{}",
            retriever__port=port,
            actor__search_timeout_s=0.5,
            learner__max_failed_groups=6,
            learner__first_samples=4,
        )
    reason = f"SearchFailed: the retriever at tcp://127.0.0.1:{port} did not answer in 0.5 s"
    sentence = (
        r"learner: the run ended: \d+ groups in a row failed without a step; most frequent reason \(\d+ of \d+ tr"
    )
    assert re.search(sentence, output)
    assert f"trajectories): {reason}. Start the retriever" in output
    assert "then start the run again: it resumes at step 0" in output
    progress = Progress.read(RunFolder(run.run_dir).progress)
    assert progress is not None
    assert progress.phase == "failed"
    assert next(iter(progress.failures)) == reason
    lines = progress_lines(progress, now=progress.written)
    assert re.match(r"the learner ended at step 0: the run ended: \d+ groups in a row failed", lines[0])
    assert f" failed: {reason} (" in lines[1]
    assert f"warning: every trajectory failed: {reason}" in lines[2:]
    samples = (run.run_dir / "first_samples.txt").read_text()
    assert samples.startswith("the first 4 trajectories:\n  endings   failed 4\n  reasons ")
    log = RunFolder(run.run_dir).log("learner").read_text()
    assert log.count("learner: ready at") == 1


@pytest.mark.slow
def test_a_run_whose_rewards_are_all_0_is_not_silent(tmp_path: Path) -> None:
    run, output = ended_run(
        tmp_path,
        '[workflow]\nuse = "asker:Asker"\ncontext_tokens = 96\ntools = ["search"]',
        learner__skip_zero_variance="true",
        learner__max_skipped_groups=8,
        learner__first_samples=8,
    )
    assert re.search(r"no signal: every reward is 0 in the last \d+ groups, which were skipped \(zero vari", output)
    progress = json.loads((run.run_dir / "progress.json").read_text())
    assert progress["warnings"][0].startswith("no signal: every reward is 0;")
    assert "warning   no signal: every reward is 0" in (run.run_dir / "first_samples.txt").read_text()
