"""The version of the code that lays out shared memory and messages.

A process that starts imports the code that is installed then, which may be newer than the supervisor's. It may only
join a daemon whose processes understand the same layout and messages.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[1]
_FILES = (
    "ipc/*.py",
    "config.py",
    "http_options.py",
    "option.py",
    "enums.py",
    "supervisor/child_entry.py",
    "supervisor/standby.py",
)


class CodeVersion(NamedTuple):
    """Digests of the installed source: of its bytes, which is fast, and of the code without comments and texts."""

    source: str
    code: str


def installed() -> CodeVersion:
    """Return the version that is installed now. It takes a tenth of a second. Raises OSError and SyntaxError."""
    return CodeVersion(_source(), _code())


def fits(version: CodeVersion) -> bool:
    """Return True if the code that is installed now can join processes of `version`."""
    return version.source == _source() or version.code == _code()


def _source() -> str:
    digest = hashlib.sha256()
    for file in _files():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _code() -> str:
    digest = hashlib.sha256()
    for file in _files():
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def _files() -> list[Path]:
    return sorted(file for pattern in _FILES for file in _ROOT.glob(pattern))
