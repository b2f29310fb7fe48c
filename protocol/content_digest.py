"""Digests of the content of files and folders: two files agree if and only if their bytes agree, wherever they are.

Every byte is read, because a sample of blocks would miss a changed byte. Reading costs about 0.5 s per GB, so the
digest of a large file is kept in the user's cache folder under the file's device, inode, size, mtime and ctime. Every
write to a file changes its ctime, which programs cannot set. A file that was written within the last seconds is not
cached: two writes within the clock's resolution have one ctime.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

from protocol.atomic_write import atomic_write

# Smaller files are read again each time.
CACHED_FROM_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_SETTLED_AFTER_S = 5.0


def text_digest(text: str) -> str:
    """128 bits as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def files_digest(folder: Path, names: Iterable[str]) -> str | None:
    """The digest of the names and contents of the files among `names` that exist in `folder`; None if none exists.

    Raises: OSError.
    """
    parts = [f"{name} {file_digest(folder / name)}" for name in sorted(names) if (folder / name).is_file()]
    return text_digest("\n".join(parts)) if parts else None


def path_digest(path: Path) -> str | None:
    """The digest of a file's content, or of the relative paths and contents of all files in a folder.

    Hidden files and `__pycache__` are left out. None if the path does not exist. Raises: OSError.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return None
    names: list[str] = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        names += [os.path.relpath(os.path.join(folder, name), path) for name in files if not name.startswith(".")]
    return files_digest(path, names) or text_digest("")


def file_digest(path: Path, *, cache: Path | None = None) -> str:
    """The digest of a file's content. `cache`: folder of known digests, by default the user's. Raises: OSError."""
    status = path.stat()
    if status.st_size < CACHED_FROM_BYTES:
        return _read(path)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = (cache or _cache_folder()) / text_digest(f"{path.resolve()} {key}")
    try:
        return known.read_text()
    except OSError:
        pass
    digest = _read(path)
    if time.time() - status.st_ctime < _SETTLED_AFTER_S:
        return digest
    with suppress(OSError):  # without a cache, the file is read again next time
        atomic_write(known, digest)
    return digest


def _read(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palimpsest" / "digests"
