"""Locks on models, for all processes that use the same files. The kernel releases them when a process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def exclusive(file: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock `file`, which is created. Calls `on_wait` if another process holds it. Raises OSError."""
    with file.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextmanager
def in_use(model_dir: Path) -> Iterator[None]:
    """Mark a model directory as used, and the directories that its links lead to, while the body runs.

    Raises OSError if this process can open no more files.
    """
    with ExitStack() as stack:
        for directory in _directories(model_dir):
            try:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # the engines report it
            stack.callback(os.close, fd)
            _try_lock(fd, fcntl.LOCK_SH)
        yield


def is_in_use(model_dir: Path) -> bool:
    """Return True if a process has marked the directory with `in_use`."""
    try:
        fd = os.open(model_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _directories(model_dir: Path) -> set[Path]:
    """Return the directory itself, and those of the files that its links name. A link is followed once: the hub's
    cache links its files to their contents, and the directory of the links is what counts as the model.
    """
    found = {model_dir}
    if model_dir.is_dir():
        targets = (model_dir / os.readlink(f) for f in model_dir.iterdir() if f.is_symlink())
        found |= {Path(os.path.normpath(t)).parent for t in targets}
    return found


def _try_lock(fd: int, kind: int) -> bool:
    """Return False if another process holds a lock that excludes this one. Some file systems have no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
