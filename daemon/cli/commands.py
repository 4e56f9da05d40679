"""How a user calls the commands of this installation: in messages that tell what to type."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]


def command(name: str) -> str:
    """Return the command `llumd` or `llumctl` as the user can type it here.

    It is the name if it is on the PATH, otherwise the launcher of the checkout or the script beside this Python.
    """
    if shutil.which(name):
        return name
    for script in (_CHECKOUT / "bin" / name, Path(sys.executable).parent / name):
        if os.access(script, os.X_OK):
            return _shortest(script)
    return name


def _shortest(script: Path) -> str:
    """Return the path from the working directory if it lies below it, otherwise the whole path."""
    try:
        return str(script.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(script)
