"""A failure of the daemon's start, in words that say what to change."""

from __future__ import annotations

import errno

from daemon.ipc.segment import SegmentError

_ADVICE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n; systemd: LimitNOFILE)",
    errno.ENFILE: "this machine has too many open files; raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes (ulimit -u; systemd: TasksMax; docker: --pids-limit)",
    errno.ENOMEM: "this machine has too little free memory; lower kv_memory, journal_memory or outbox_memory",
}


class StartError(Exception):
    """The machine does not allow the start; the message names what failed."""


def explain(error: OSError) -> str:
    """Return what the system reported, and what to do about it if that is known."""
    text = error.strerror or str(error)
    if isinstance(error, SegmentError):
        return text
    text += f": {error.filename}" if error.filename else ""
    advice = _ADVICE.get(error.errno or 0)
    return f"{text}; {advice}" if advice else text
