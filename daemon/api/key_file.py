"""The key file: one API key a line, with the priorities and the tenant of its requests.

It imports little: the supervisor reads the file too, at each reload.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from daemon.config import ConfigError
from daemon.control.policy.priority import ALLOWED, parse_priority
from daemon.ipc.keys_page import MAX_KEYS, MAX_TENANT, Key

_MAX_FILE = 4 << 20  # bytes
_ATTRIBUTES = ("priority=", "max-priority=", "tenant=")
_FORM = "the line must be a key, then any of `priority=`, `max-priority=` and `tenant=` once, each with a value"
_TENANT = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_TENANT}}}")


def read_key_file(file: Path) -> list[Key]:
    """Return the keys of a file: one per line, optionally followed by attributes (see `parse_key`).

    Blank lines and lines that start with ``#`` are ignored. Raises ConfigError if the file cannot be read, a line
    has another form, or no line has a key, because without keys all clients would be refused. No error message
    repeats any part of a line.
    """
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(_read(file).splitlines(), 1):
        try:
            if (key := parse_key(line)) and keys.setdefault(key.digest, key) != key:
                raise ValueError("an earlier line gives this key another priority or tenant")
        except ValueError as e:
            raise ConfigError(f"api_key_file: line {number} of {file}: {e}") from None
    if not keys:
        raise ConfigError(f"api_key_file: {file} holds no key")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"api_key_file: {file} holds {len(keys)} keys; it may hold at most {MAX_KEYS}")
    return list(keys.values())


def parse_key(line: str) -> Key | None:
    """Return the key on a line of the key file, or None if the line has none.

    Attributes: ``priority=`` of requests that set none (normal), ``max-priority=``, the most urgent that a request
    may have (the same as ``priority=``), and ``tenant=``. The message of a ValueError names the allowed form and
    repeats no part of the line.
    """
    if not line.strip() or line.strip().startswith("#"):
        return None
    key, *attributes = line.split()
    values = {name: a[len(name) :] for a in attributes for name in _ATTRIBUTES if a.startswith(name)}
    if key.startswith(_ATTRIBUTES) or len(values) < len(attributes):
        raise ValueError(_FORM)
    highest = _priority(values, "max-priority=")
    priority = _priority(values, "priority=")
    if priority is None:
        priority = max(0, highest or 0)
    if highest is None:
        highest = priority
    if priority < highest:
        raise ValueError("`max-priority=` must be as high as `priority=` or higher")
    return Key(digest(key), priority, highest, _tenant(values))


def digest(key: str) -> bytes:
    """Return the SHA-256 digest of a key."""
    # Header bytes that are not UTF-8 arrive as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _priority(values: dict[str, str], name: str) -> int | None:
    if name not in values:
        return None
    try:
        return parse_priority(values[name])
    except ValueError:
        raise ValueError(f"`{name}` must be followed by {ALLOWED}") from None


def _tenant(values: dict[str, str]) -> str:
    name = values.get("tenant=")
    if name is None:
        return ""
    if not _TENANT.fullmatch(name):
        raise ValueError(
            f"`tenant=` must be followed by a name of 1 to {MAX_TENANT} letters, digits, dots, hyphens or underscores"
        )
    return name


def _read(file: Path) -> str:
    """Return the text of a regular file. Other files are refused: to read a pipe could block the reader for ever."""
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ConfigError(f"api_key_file: {file} is not a regular file")
            content = opened.read(_MAX_FILE + 1)
    except OSError as e:
        raise ConfigError(f"api_key_file: cannot read {file}: {e.strerror}") from None
    if len(content) > _MAX_FILE:
        raise ConfigError(f"api_key_file: {file} is larger than {_MAX_FILE >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file: {file} is not text in UTF-8") from None
