"""The processes of a demo's stages print progress lines that the live view can read."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from learner.warmstart.recipe import NUM_STEPS
from protocol.step_progress import StepProgress
from retriever.command import index


def test_index_prints_its_progress_where_there_is_no_terminal(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(i), "text": f"w{i}"}) + "\n" for i in range(300)))
    done = CliRunner().invoke(index, [str(corpus), "--out", str(tmp_path / "index"), "--encoder", "bow"])
    assert done.exit_code == 0, done.output
    log = tmp_path / "index.log"
    log.write_text(done.output)
    assert StepProgress.last_in(log) == StepProgress(300, 300, "passages of corpus.jsonl")


def test_the_warm_start_states_the_number_of_steps_of_each_phase() -> None:
    assert set(NUM_STEPS) == {"copying", "imitation"}
    assert str(StepProgress(10, NUM_STEPS["copying"], "steps of copying, loss 0.5")) == (
        "progress: 10/700 steps of copying, loss 0.5"
    )


def test_progress_lines_are_read_from_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert StepProgress.last_in(log) is None
    log.write_text("noise\n" * 10_000 + str(StepProgress(1, 2, "files")) + "\n")
    assert StepProgress.last_in(log) == StepProgress(1, 2, "files")
    log.write_text(f"{StepProgress(1, 2, 'files')}\n" + "noise\n" * 10_000)
    assert StepProgress.last_in(log) is None
    log.write_bytes(b"\xff\xfe progress: 1/2 x\nprogress: x/2 y\n")
    assert StepProgress.last_in(log) is None
