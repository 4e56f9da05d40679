"""Text output of `llumctl`: tables of engines and requests, and one line for each event, in local time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from daemon.ipc.events import clipped
from daemon.units import format_value

Row = dict[str, Any]

_ENGINE_HEADINGS = (
    *("ENGINE", "DEVICE", "STATE", "PID", "UP", "RESTARTS"),
    *("RUN", "WAIT", "KV", "TOK/S", "STEP", "FREENESS"),
)

# -- tables ------------------------------------------------------------------------------------

# Columns that a narrow terminal does not show, the first one first.
_SPARE_ENGINE = ("RESTARTS", "STEP", "PID", "DEVICE", "UP", "FREENESS", "TOK/S", "WAIT")
_SPARE_PROCESS = ("RESTARTS", "PID", "UP", "CONNECTIONS")
_ALSO_ARRIVED = (("parking", "parked"), ("parked", "draining"))  # state, desired state
_SPARE_REQUEST = ("MAX", "PRIORITY", "PROMPT", "PHASE", "AGE", "OUTPUT")


def status_lines(status: Row, width: int = 0) -> list[str]:
    """Return the status of the daemon as lines of text, of at most `width` characters if it is not 0."""
    head = f"llumd {status['version']}  {status['model']}  {status['address']}"
    weights = _weights(status["engines"])
    if len(weights) == 1:
        head += f"  weights {next(iter(weights))}"
    engines = table(_ENGINE_HEADINGS, [_engine_row(e) for e in status["engines"]], width, _SPARE_ENGINE)
    others = [
        ["coordinator", status["coordinator"]],
        *([f"frontend {f['frontend']}", f] for f in status["frontends"]),
    ]
    rows = [
        [name, _state(p), *_pid_and_age(p), p["restarts"], p.get("active", ""), _connections(p)] for name, p in others
    ]
    headings = ("PROCESS", "STATE", "PID", "UP", "RESTARTS", "REQUESTS", "CONNECTIONS")
    processes = table(headings, rows, width, _SPARE_PROCESS)
    more = [*_connection_warnings(status["frontends"]), *_key_lines(status.get("keys"))]
    return [head, *_notice(status), *_different_weights(weights), "", *engines, "", *processes, *more]


def _notice(status: Row) -> list[str]:
    """Return a line that says why the daemon serves no new request; none if it does."""
    shutdown = status.get("shutdown")
    if shutdown is not None:
        left = f"{_count(shutdown['requests'], 'request')} left, cut off in {shutdown['seconds_left']:.0f} s"
        return [f"shutting down: {left}; new requests get 503"]
    if status.get("state") == "not_serving":
        return ["not serving: it starts, or no engine or no frontend runs"]
    return []


def _weights(engines: list[Row]) -> dict[str, list[int]]:
    """Return the engines by their weights, in short form."""
    found: dict[str, list[int]] = {}
    for engine in engines:
        if "weights" in engine:
            found.setdefault(engine["weights"][:8], []).append(engine["engine"])
    return found


def _different_weights(weights: dict[str, list[int]]) -> list[str]:
    if len(weights) < 2:
        return []
    names = (f"{name} on engine {', '.join(map(str, engines))}" for name, engines in weights.items())
    return [f"different weights: {'; '.join(names)}; a request ends on those that it began with"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _key_lines(keys: Row | None) -> list[str]:
    if keys is None:
        return []
    accepted = f"API keys: {keys['accepted']}; named tenants: {keys['tenants']}"
    return ["", accepted, *([f"the last reload changed nothing: {keys['error']}"] if keys["error"] else [])]


def _connections(process: Row) -> str:
    return f"{process['connections']}/{process['max_connections']}" if process.get("max_connections") else ""


def _connection_warnings(frontends: list[Row]) -> list[str]:
    """Return a line for each frontend that has reached its limit of connections since the start of the daemon."""
    lines = []
    for frontend in frontends:
        cut = frontend.get("connections_cut", {})
        closed, refused = cut.get("limit", 0), cut.get("refused", 0)
        if closed or refused:
            what = f"{closed} idle connections closed, {refused} new ones refused"
            lines.append(f"frontend {frontend['frontend']} has reached its limit of connections: {what}")
    return ["", *lines] if lines else []


def _engine_row(e: Row) -> list[Any]:
    row = [e["engine"], e["device"], _engine_state(e), *_pid_and_age(e), e["restarts"]]
    if "running" not in e:
        return [*row, "", "", "", "", "", ""]
    free = "max" if e["freeness"] is None else f"{e['freeness']:.0f}"
    load = [e["running"], e["waiting"], f"{e['kv_usage']:.0%}", f"{e['tokens_per_second']:.0f}"]
    return [*row, *load, f"{e['step_ms']:.1f} ms", free]


def _engine_state(e: Row) -> str:
    """Return the state, with the desired one if the engine is still on its way to it."""
    state, desired = str(e["state"]), e.get("desired", "serving")
    if desired == "serving":
        arrived = state not in ("draining", "parking", "parked")
    else:
        arrived = state in (desired, "failed", "stopped") or (state, desired) in _ALSO_ARRIVED
    state = _state(e)
    return state if arrived else f"{state}, to be {desired}"


def _state(process: Row) -> str:
    """Return the state of a process, and by how much its next sign of life is late."""
    late = process.get("overdue_seconds", 0.0)
    return f"{process['state']}, {_duration(late)} late" if late else str(process["state"])


def _pid_and_age(process: Row) -> tuple[Any, str]:
    """Return the pid and the age of a process, both empty while it is down."""
    return ("", "") if process["pid"] is None else (process["pid"], _duration(process["uptime_seconds"]))


def request_lines(requests: list[Row], width: int = 0) -> list[str]:
    """Return the unfinished requests as lines of text, of at most `width` characters if it is not 0."""
    if not requests:
        return ["no unfinished requests"]
    headings = ["REQUEST", "ENGINE", "PHASE", "PROMPT", "OUTPUT", "MAX", "PRIORITY", "AGE"]
    names = ("id", "engine", "phase", "prompt_tokens", "output_tokens", "max_tokens", "priority")
    rows = [[*(r[n] for n in names), _duration(r["age_seconds"])] for r in requests]
    return table(headings, rows, width, _SPARE_REQUEST)


def option_lines(rows: list[Row]) -> list[str]:
    """Return the options of the daemon, their values and sources as lines of text."""
    cells = [[o["name"], format_value(o["value"], o["unit"]), o["unit"], o["origin"]] for o in rows]
    return table(["OPTION", "VALUE", "UNIT", "SET BY"], cells)


def table(headings: Sequence[str], rows: list[list[Any]], width: int = 0, spare: Sequence[str] = ()) -> list[str]:
    """Return a table as lines of text. Columns of numbers are aligned right, other columns left.

    A table wider than `width` leaves out the columns in `spare`, one after another, until it fits. 0: no limit.
    """
    for name in (*spare, None):
        lines = _table(headings, rows)
        if not width or name is None or max(map(len, lines)) <= width:
            break
        i = list(headings).index(name)
        headings = [*headings[:i], *headings[i + 1 :]]
        rows = [[*row[:i], *row[i + 1 :]] for row in rows]
    return lines


def _table(headings: Sequence[str], rows: list[list[Any]]) -> list[str]:
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(headings)]
    right = [_is_numeric([r[i] for r in rows]) for i in range(len(headings))]

    def line(row: list[str]) -> str:
        parts = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(parts).rstrip()

    return [line(list(headings)), *(line(row) for row in cells)]


def _is_numeric(column: list[Any]) -> bool:
    """Return True if the column has numbers, and nothing else but empty cells."""
    filled = [cell for cell in column if cell != ""]
    return bool(filled) and all(isinstance(cell, int | float) for cell in filled)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


# -- events ------------------------------------------------------------------------------------


class RequestFilter:
    """Selects the events of one request. `name`: its id, the id of its answer, its number in hex or its x-request-id.

    The id of one choice is `<id of the answer>-<number>`; an order may name either. Only the first and the last event
    of a request have its x-request-id, so the filter learns the ids from these.
    """

    def __init__(self, name: str) -> None:
        self._x_request_id = clipped(name)
        self._names = {name}

    def learn(self, row: Row) -> None:
        """Take note of the request's id if this event has the x-request-id."""
        if self._x_request_id and row.get("x_request_id") == self._x_request_id:
            self._names.add(row["request"])

    def concerns(self, row: Row) -> bool:
        """Return True if the event is about the request."""
        request = row.get("request", "")
        number = f"{row['rid']:x}" if "rid" in row else ""
        return bool(request) and any(
            name in (request, number) or _is_choice(request, name) or _is_choice(name, request)
            for name in self._names
        )


def _is_choice(request: str, answer: str) -> bool:
    head, _, number = request.rpartition("-")
    return head == answer and number.isdigit()


def event_line(row: Row) -> str:
    """Return one event as text: local time, process, kind, and what happened."""
    clock = time.strftime("%H:%M:%S", time.localtime(row["time"]))
    milliseconds = int(row["time"] % 1 * 1000)
    describe = _DESCRIPTIONS.get(row["kind"], _unknown_kind)
    return f"{clock}.{milliseconds:03d}  {row['process']:<12} {row['kind']:<11} {describe(row)}"


def _dispatched(row: Row) -> str:
    priority = f", priority {row['priority']}" if row["priority"] else ""
    again = f", again: {row['again']}" if row["again"] else ""
    prompt = _count(row["prompt_tokens"], "prompt token")
    return f"{row['request']} to engine {row['engine']}, {prompt}{priority}{again}{_sent_as(row)}"


def _finished(row: Row) -> str:
    early = row["result"] not in ("stop", "length")
    result = f"ended early by {row['result']}" if early else row["result"]
    detail = f" ({row['detail']})" if row["detail"] else ""
    end = f"{result}{detail}, {_count(row['output_tokens'], 'output token')}, {row['seconds']:.2f} s"
    return f"{row['request']} on engine {row['engine']}: {end}{_sent_as(row)}"


def _sent_as(row: Row) -> str:
    """Return the x-request-id of the client, if it has sent one."""
    name = row.get("x_request_id")
    return f", x-request-id {name}" if name else ""


def _taken_over(row: Row) -> str:
    return f"{row['request']} from engine {row['engine']} to engine {row['to']} after {row['output_tokens']} tokens"


def _move_ended(row: Row) -> str:
    detail = f" ({row['detail']})" if row["detail"] else ""
    head = f"{row['request']} to engine {row['to']}, reason {row['reason']}: {row['result']}{detail}"
    skipped = f" + {row['skipped']} already there" if row["skipped"] else ""
    copied = f"{_size(row['nbytes'])}, {row['blocks']} blocks{skipped}, {row['stages']} stages"
    return f"{head}; {copied}, {row['seconds'] * 1e3:.1f} ms, frozen {row['frozen_seconds'] * 1e3:.1f} ms"


def _handed_back(row: Row) -> str:
    return f"{row['request']}, reason {row['reason']}: {row['detail']}"


def _preempted(row: Row) -> str:
    return f"{row['request']}: {row['tokens']} tokens to recompute"


def _engine(row: Row) -> str:
    return str(row["state"])


def _ordered(row: Row) -> str:
    objects = [row["request"]] if row["request"] else []
    objects += [f"engine {row['engine']}"] if row["engine"] >= 0 else []
    objects += [row["detail"]] if row["detail"] else []
    return f"{row['action']} {', '.join(objects)}, by {row['by']}"


def _missed(row: Row) -> str:
    return f"{row['count']} events were overwritten before they could be read"


def _unknown_kind(row: Row) -> str:
    """Describe an event of a daemon that is newer than this command."""
    return ", ".join(f"{k}={v}" for k, v in row.items() if k not in ("time", "process", "kind"))


_DESCRIPTIONS = {
    "dispatched": _dispatched,
    "finished": _finished,
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
