"""The source distribution and the wheel: their files, their dependencies, and an install into an empty environment."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actor", "learner", "palimpsest", "protocol", "retriever")
TIMEOUT_S = 300.0


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", name="source")
def _source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git does not ignore: a build inside the checkout would leave a build folder there."""
    folder = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and not name.startswith(("tests/", "benchmarks/", "examples/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())
    return folder


def build(source: Path, dist: Path) -> Path:
    """The wheel as `python -m build` makes it, from the source distribution. Without isolation: no download."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=source)
    assert len(list(dist.glob("palimpsest_rl-*.tar.gz"))) == 1
    (wheel,) = dist.glob("palimpsest_rl-*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def package_files(source: Path) -> set[str]:
    paths = (path for package in PACKAGES for path in (source / package).rglob("*"))
    return {path.relative_to(source).as_posix() for path in paths if path.is_file()}


def test_the_wheel_has_every_file_of_the_packages(source: Path, tmp_path: Path) -> None:
    """Modules, templates, the skeleton of `palimpsest init`, and the markers of typed packages."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("palimpsest_rl-*.whl")
    names = contents(wheel)
    assert names == package_files(source)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"actor/chat/templates/system.jinja", "learner/launch/skeleton/run.toml"} <= names


def test_package_files_are_read_as_resources_of_a_package() -> None:
    """A path from `__file__` could name a file outside of the packages, which no wheel has."""
    folders: set[str] = set()
    for path, tree in trees():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Name) and node.id == "__file__"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "files":
                folders |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    assert folders == {"actor.chat", "learner.launch"}
    assert all((ROOT / folder.replace(".", "/") / "__init__.py").is_file() for folder in folders)


def test_every_imported_library_is_a_declared_dependency() -> None:
    """Else an install into an empty environment lacks it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name, group in optional.items() if name != "dev" for each in group)]
    declared = {normal(re.split(r"[^\w.-]", each)[0]) for each in wanted}
    distributions = packages_distributions()
    known = {*PACKAGES, *sys.stdlib_module_names}
    undeclared = {
        f"{path}: {name}"
        for path, tree in trees()
        for name in imported(tree)
        if name not in known and not declared & set(map(normal, distributions.get(name, [name])))
    }
    assert not undeclared


def imported(tree: ast.Module) -> Iterator[str]:
    """The first part of every imported module's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.slow
def test_a_built_wheel_works_in_an_empty_environment(source: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment, added behind the new one's own packages: no download."""
    wheel = build(source, tmp_path / "dist")
    assert contents(wheel) == package_files(source)
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", wheel, cwd=tmp_path)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    imports = "".join(f"import {name}; print({name}.__path__[0])\n" for name in PACKAGES)
    assert run(python, "-c", imports, cwd=tmp_path).split() == [str(site / name) for name in PACKAGES]
    palimpsest = home / "bin" / "palimpsest"
    assert run(palimpsest, "--version", cwd=tmp_path).startswith("palimpsest, version ")
    assert "by asynchronous reinforcement learning" in " ".join(run(palimpsest, "--help", cwd=tmp_path).split())
    run(palimpsest, "init", "agent", cwd=tmp_path)
    assert {"agent.py", "run.toml", "model"} == {path.name for path in (tmp_path / "agent").iterdir()}
    render = "from actor.chat.chatml import ChatRendering; ChatRendering(tools=[{'name': 'search'}]); print('ok')"
    assert run(python, "-c", render, cwd=tmp_path) == "ok\n", "its templates are read from the wheel"
    steps = ("--set", "learner.num_steps=1")
    done = run(
        "env", f"PYTHONPATH={tmp_path / 'agent'}", palimpsest, "up", "agent/run.toml", "--quiet", *steps, cwd=tmp_path
    )
    assert (tmp_path / "agent" / "runs" / "my-agent" / "store.sqlite").is_file(), done
