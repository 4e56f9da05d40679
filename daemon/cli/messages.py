"""What commands say on stderr."""

from __future__ import annotations

import sys

from daemon.ipc.child import EXIT_CONFIG
from daemon.supervisor.start_error import explain


def refuse(error: Exception) -> int:
    """Say why `llumd` does not do what was asked, in the same words in every command. Return the exit code."""
    why = f"cannot start: {explain(error)}" if isinstance(error, OSError) else error
    print(f"llumd: {why}", file=sys.stderr)
    return EXIT_CONFIG


def print_progress(text: str) -> None:
    """Print a line before, or during, a slow step."""
    print(text, file=sys.stderr, flush=True)
