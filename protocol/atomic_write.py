"""Atomic writes of files and folders: they are written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write a file or a folder to, which is renamed to `path` at the end.

    A file replaces an older one; a folder must not exist yet. If the body raises, the temporary path is removed.
    The temporary name starts with a dot and contains the process id, so two processes never write to the same one.
    """
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    _remove(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def atomic_write(path: Path, data: str | bytes) -> None:
    """Writes `data` to `path`. Readers see the old content or the new one. Raises: OSError."""
    with atomic_path(path) as temporary:
        if isinstance(data, str):
            temporary.write_text(data, encoding="utf-8")
        else:
            temporary.write_bytes(data)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
