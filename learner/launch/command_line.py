"""Formats command lines for messages, so that the user can paste them into the current shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(program: str, *arguments: str | Path, argv0: str | None = None) -> str:
    """Returns a command line that runs `program`, a script installed with Palimpsest, from the current folder.

    The program is a bare name if the shell finds the same file by that name, else a path. Paths below the current
    folder are relative. `argv0` defaults to sys.argv[0].
    """
    called = Path(sys.argv[0] if argv0 is None else argv0)
    script = called.with_name(program)
    if not script.exists():  # python -m learner.launch, or python some/script.py
        script = Path(sys.executable).with_name(program)
    if _is_same_file(shutil.which(program), script):
        command = program
    else:
        path = relative(script)
        command = f"./{path}" if path.parent == Path() else str(path)
    return shlex.join([command, *(str(relative(each)) if isinstance(each, Path) else each for each in arguments)])


def with_runnable_commands(text: str) -> str:
    """Returns a message in which every "`palimpsest …`" begins with a path if the shell does not find `palimpsest`."""
    return text.replace("`palimpsest ", f"`{command_line('palimpsest')} ")


def relative(path: Path) -> Path:
    """Returns `path` relative to the current folder if it is below it, else unchanged."""
    # abspath, because resolve() would follow the symbolic link from a virtual environment to the system's python
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else path


def _is_same_file(found: str | None, script: Path) -> bool:
    return found is not None and (not script.exists() or Path(found).samefile(script))
