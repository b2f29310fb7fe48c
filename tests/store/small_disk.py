"""Disks that are really full: a small tmpfs, where this user may mount one, and a limit on the size of files."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, num_bytes: int) -> Iterator[Path]:
    """Mounts a tmpfs of this size on `folder`. Skips the test if this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, num_bytes_left: int = 0) -> Path:
    """Fills the disk of `folder` with a file, which it returns: delete it to make room."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size, chunk = 0, 1 << 16
        while chunk:
            try:
                size += file.write(bytes(chunk))
            except OSError:
                chunk //= 2
        file.truncate(max(0, size - num_bytes_left))
    return ballast


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `num_bytes`: a write ends there, the next one fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
