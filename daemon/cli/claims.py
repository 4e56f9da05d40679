"""What one running daemon has for itself: the lock of its run directory, the HTTP port and the admin socket.

`llumd serve` keeps them until it ends. `llumd check` tries the same and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from daemon.config import Config, ConfigError
from daemon.directories import run_dir

_MAX_SOCKET_PATH = 107  # bytes, of the kernel
_PROBE_TIMEOUT = 1.0  # seconds


class Claims(NamedTuple):
    """The claims of a daemon. Both sockets are bound; no client can connect before they listen."""

    directory: Path
    http: socket.socket
    admin: socket.socket


@contextmanager
def claimed(config: Config, *, on_trial: bool = False) -> Iterator[Claims]:
    """Claim everything while the body of the `with` statement runs.

    Afterwards the admin socket is gone; with `on_trial` also the directories and the lock file that were created.
    Raises ConfigError for what cannot be claimed.
    """
    directory = run_dir(config)
    with contextlib.ExitStack() as stack:
        created = _make_directory(directory)
        if on_trial:
            stack.callback(_remove_directories, created)
        _lock(directory, stack, remove=on_trial)
        http = stack.enter_context(_bind(config))
        admin = stack.enter_context(_bind_admin(directory / "admin.sock", stack))
        yield Claims(directory, http, admin)


def _make_directory(directory: Path) -> list[Path]:
    """Create the directory and those above it. Return the new ones, the innermost first."""
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as e:
        raise _unusable(directory, e) from None
    return missing


def _remove_directories(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):  # another process may use them by now
        for directory in directories:
            directory.rmdir()


def _lock(directory: Path, stack: contextlib.ExitStack, *, remove: bool) -> None:
    """Lock the run directory until `stack` unwinds; the kernel releases the lock of a process that is killed.

    `remove`: delete the lock file at the end if this call has created it.
    """
    file = directory / "lock"
    while True:
        try:
            new = not file.exists()
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise _unusable(directory, e) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise ConfigError(
                f"run_dir: another llumd uses {directory}; stop it, or choose another directory with --run-dir"
            ) from None
        if _is_open_as(file, fd):
            break
        os.close(fd)  # a check has just deleted the file, so its lock protects nothing
    stack.callback(os.close, fd)
    if remove and new:
        stack.callback(lambda: file.unlink(missing_ok=True))  # runs while the lock is still held


def _is_open_as(file: Path, fd: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _bind(config: Config) -> socket.socket:
    """Bind the socket that all frontends share, so that a killed frontend loses no queued connection."""
    where = f"{config.host}:{config.port}"
    try:
        info = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as e:  # a name with an empty or a very long label cannot be encoded
        why = e.strerror if isinstance(e, OSError) else "it is not a host name"
        raise ConfigError(f"host: cannot listen on {where}: {why}; choose another address with --host") from None
    sock = socket.socket(info[0], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
    except OSError as e:
        sock.close()
        raise _bind_error(config, e) from None
    return sock


def _bind_error(config: Config, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        by = " by another llumd" if _is_llumd(config.host, config.port) else ""
        return ConfigError(f"port: {config.port} on {config.host} is in use{by}; choose another port with --port")
    if error.errno == errno.EACCES:
        why = f"{error.strerror}; ports below 1024 need a privilege, choose another port with --port"
        return ConfigError(f"port: cannot listen on {config.host}:{config.port}: {why}")
    why = f"{error.strerror}; choose another address with --host"
    return ConfigError(f"host: cannot listen on {config.host}:{config.port}: {why}")


def _is_llumd(host: str, port: int) -> bool:
    """Return True if a llumd answers on the port."""
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().getheader("Server") == "llumd"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _bind_admin(path: Path, stack: contextlib.ExitStack) -> socket.socket:
    """Bind the admin socket. Its file is deleted at the end."""
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ConfigError(
            f"run_dir: the path of the socket {path} has more than {_MAX_SOCKET_PATH} bytes; "
            "choose a shorter directory with --run-dir"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        path.unlink(missing_ok=True)  # We hold the lock, so the socket is from a daemon that was killed.
        sock.bind(str(path))
    except OSError as e:
        sock.close()
        raise ConfigError(f"run_dir: cannot create {path}: {e.strerror or e}") from None
    finally:
        os.umask(before)
    stack.callback(lambda: path.unlink(missing_ok=True))
    return sock


def _unusable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run_dir: cannot use {directory}: {error.strerror}; choose another directory with --run-dir")
