"""Events as lines for people: `llumctl events`."""

from __future__ import annotations

import time
from typing import Any

Row = dict[str, Any]


def concerns(row: Row, name: str) -> bool:
    """Whether it is about the request called `name`: its own id, that of its answer, or its number. An order may
    have named the answer of a request."""
    request = row.get("request", "")
    number = f"{row['rid']:x}" if "rid" in row else ""
    return bool(request) and (name in (request, number) or _is_choice(request, name) or _is_choice(name, request))


def _is_choice(request: str, answer: str) -> bool:
    head, _, number = request.rpartition("-")
    return head == answer and number.isdigit()


def event_line(row: Row) -> str:
    """One event: local time, who tells it, its kind, and what happened."""
    clock = time.strftime("%H:%M:%S", time.localtime(row["time"]))
    thousandths = int(row["time"] % 1 * 1000)
    tell = _TELL.get(row["kind"], _anything)
    return f"{clock}.{thousandths:03d}  {row['process']:<12} {row['kind']:<11} {tell(row)}"


def _dispatched(row: Row) -> str:
    priority = f", priority {row['priority']}" if row["priority"] else ""
    again = f", again: {row['again']}" if row["again"] else ""
    return f"{row['request']} to engine {row['engine']}, {row['prompt_tokens']} prompt tokens{priority}{again}"


def _taken_over(row: Row) -> str:
    return f"{row['request']} from engine {row['engine']} to engine {row['to']} after {row['output_tokens']} tokens"


def _move_ended(row: Row) -> str:
    detail = f" ({row['detail']})" if row["detail"] else ""
    head = f"{row['request']} to engine {row['to']}, reason {row['reason']}: {row['result']}{detail}"
    there = f" + {row['skipped']} there already" if row["skipped"] else ""
    copied = f"{_size(row['nbytes'])}, {row['blocks']} blocks{there}, {row['stages']} stages"
    return f"{head}; {copied}, {row['seconds'] * 1e3:.1f} ms, frozen {row['frozen_seconds'] * 1e3:.1f} ms"


def _handed_back(row: Row) -> str:
    return f"{row['request']}, reason {row['reason']}: {row['detail']}"


def _preempted(row: Row) -> str:
    return f"{row['request']}: {row['tokens']} tokens to compute anew"


def _engine(row: Row) -> str:
    return f"{row['state']}"


def _ordered(row: Row) -> str:
    about = [row["request"]] if row["request"] else []
    about += [f"engine {row['engine']}"] if row["engine"] >= 0 else []
    about += [row["detail"]] if row["detail"] else []
    return f"{row['action']} {', '.join(about)}, by {row['by']}"


def _missed(row: Row) -> str:
    return f"{row['count']} events were overwritten before they could be read"


def _anything(row: Row) -> str:
    """Of a daemon that is newer than this command."""
    return ", ".join(f"{k}={v}" for k, v in row.items() if k not in ("time", "process", "kind"))


_TELL = {
    "dispatched": _dispatched,
    "taken_over": _taken_over,
    "move_ended": _move_ended,
    "handed_back": _handed_back,
    "preempted": _preempted,
    "engine": _engine,
    "ordered": _ordered,
    "missed": _missed,
}


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
