"""`palimpsest up --dry-run` finds what `palimpsest check` finds, and starts nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.tiny_run import make_tiny_run

TIMEOUT_S = 120.0


@pytest.mark.parametrize(("missing", "named"), [("model", "model.path"), ("index", "index")])
def test_a_missing_model_or_index_fails(missing: str, named: str, tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    shutil.rmtree({"model": run.model, "index": run.index}[missing])
    command = [sys.executable, "-m", "learner.launch", "up", str(run.config), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 2, done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert any(named in line for line in failed), done.stdout
    assert not run.run_dir.exists()
