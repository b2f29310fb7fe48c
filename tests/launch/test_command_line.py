"""Printed command lines: a shell in the current folder runs them as printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from learner.launch.command_line import command_line, relative, with_runnable_commands


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an environment whose scripts are not on PATH."""
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("palimpsest", "tensorboard", "python"):
        (scripts / name).write_text("#!/bin/sh\n")
        (scripts / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize("folder", ["", "checkout"], ids=["relative", "absolute"])
def test_a_script_off_the_path_is_named_by_its_relative_path(checkout: Path, folder: str) -> None:
    argv0 = str((checkout if folder else Path()) / ".venv/bin/palimpsest")
    run_dir = checkout / "runs" / "demo-1"
    assert command_line("palimpsest", "audit", run_dir, argv0=argv0) == ".venv/bin/palimpsest audit runs/demo-1"
    assert command_line("tensorboard", "--logdir", run_dir, argv0=argv0) == ".venv/bin/tensorboard --logdir runs/demo-1"


def test_a_script_on_the_path_is_named_by_its_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = checkout / ".venv" / "bin"
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    assert command_line("palimpsest", "demo", argv0=str(scripts / "palimpsest")) == "palimpsest demo"


def test_a_path_is_printed_if_another_script_of_the_same_name_is_on_path(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkout / "other"
    other.mkdir()
    (other / "palimpsest").write_text("#!/bin/sh\n")
    (other / "palimpsest").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert command_line("palimpsest", "demo", argv0=".venv/bin/palimpsest") == ".venv/bin/palimpsest demo"


def test_python_m_names_the_scripts_beside_the_interpreter(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(checkout / ".venv/bin/python"))
    argv0 = str(checkout / "learner" / "launch" / "__main__.py")
    assert command_line("palimpsest", "demo", argv0=argv0) == ".venv/bin/palimpsest demo"


def test_a_script_in_the_current_folder_and_odd_paths_are_quoted(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout / ".venv" / "bin")
    run_dir = checkout / "my run"
    assert command_line("palimpsest", "audit", run_dir, argv0="palimpsest") == f"./palimpsest audit '{run_dir}'"


def test_only_paths_below_the_current_folder_become_relative(checkout: Path) -> None:
    assert relative(checkout / "runs") == Path("runs")
    assert relative(checkout.parent) == checkout.parent


def test_a_script_of_another_folder_names_the_scripts_beside_the_interpreter(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(checkout / ".venv/bin/python"))
    assert command_line("palimpsest", "up", argv0="examples/prepare.py") == ".venv/bin/palimpsest up"


def test_commands_in_messages_can_be_pasted(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/palimpsest"])
    shown = with_runnable_commands("run `palimpsest keys DIR`, then `palimpsest up` with `network.keys`")
    assert shown == "run `.venv/bin/palimpsest keys DIR`, then `.venv/bin/palimpsest up` with `network.keys`"
    assert with_runnable_commands(shown) == shown
    monkeypatch.setenv("PATH", str(checkout / ".venv" / "bin"), prepend=os.pathsep)
    assert with_runnable_commands("run `palimpsest keys DIR`") == "run `palimpsest keys DIR`"
