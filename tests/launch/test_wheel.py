"""The wheel, installed into another folder, works without the checkout: packages, templates, the command."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git does not ignore: a build inside the checkout would leave a build folder there."""
    folder = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and not name.startswith(("tests/", "benchmarks/", "examples/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())
    return folder


def test_the_wheel_works_from_another_folder(source: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"actor", "learner", "palimpsest", "protocol", "retriever"}
    sources = {path.relative_to(source).as_posix() for top in tops for path in (source / top).rglob("*.jinja")}
    assert sources
    assert sources <= set(names)
    modules = {path.relative_to(source).as_posix() for top in tops for path in (source / top).rglob("*.py")}
    assert modules <= set(names), "a package is missing from the wheel"

    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    packages = ("actor", "learner", "palimpsest", "protocol", "retriever")
    imports = "".join(f"import {name}; print({name}.__path__[0])\n" for name in packages)
    where = run(sys.executable, "-c", imports, cwd=elsewhere, path=site).split()
    assert where == [str(site / name) for name in packages]
    shown = run(str(site / "bin" / "palimpsest"), "--help", cwd=elsewhere, path=site)
    assert "by asynchronous reinforcement learning" in " ".join(shown.split())
    render = "from actor.chat.chatml import ChatRendering; ChatRendering(tools=[{'name': 'search'}]); print('ok')"
    assert run(sys.executable, "-c", render, cwd=elsewhere, path=site) == "ok\n", (
        "its templates are read from the wheel"
    )
