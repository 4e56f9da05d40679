"""The `llumctl` command: see and steer a running daemon through its admin socket.

Exit codes: 0 done, 1 the daemon refused or failed, 2 usage, 3 no daemon is running, 4 it did not answer in time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from daemon.cli.format import concerns, event_line
from daemon.config import parse_seconds, run_dir
from daemon.enums import MigrationMode
from daemon.ipc.events import KINDS

EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_TIMEOUT = 1, 3, 4
_TIMEOUT = 10.0
_ENGINE_HEADINGS = (
    *("ENGINE", "DEVICE", "STATE", "PID", "UP", "RESTARTS"),
    *("RUN", "WAIT", "KV", "TOK/S", "STEP", "FREENESS"),
)


class NotRunning(Exception):
    """Nobody answers on the socket."""


class Refused(Exception):
    """The daemon answered with an error."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("llumd", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(path: Path, method: str, route: str) -> dict[str, Any]:
    """One request on the admin socket. Raises NotRunning, Refused or TimeoutError."""
    connection = _UnixConnection(path)
    try:
        connection.request(method, route)
        response = connection.getresponse()
        body = json.loads(response.read())
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(f"llumd is not running (nobody listens on {path})") from None
    except PermissionError:
        raise Refused(f"you may not use {path}; its group may") from None
    except (http.client.HTTPException, ConnectionError, ValueError) as e:
        raise Refused(f"the daemon's answer broke off: {e}") from None
    finally:
        connection.close()
    if response.status >= 400:
        raise Refused(body.get("error", f"status {response.status}"))
    return body


def stream(path: Path, route: str, timeout: float | None = _TIMEOUT) -> Iterator[dict[str, Any]]:
    """The rows of an answer that may take for ever, until the coordinator ends. `timeout`: seconds that the answer
    may take to begin. Raises NotRunning, Refused or TimeoutError."""
    connection = _UnixConnection(path)
    connection.timeout = timeout
    try:
        connection.request("GET", route)
        sock, response = connection.sock, connection.getresponse()
        if response.status >= 400:
            raise Refused(json.loads(response.read()).get("error", f"status {response.status}"))
        sock.settimeout(None)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            while (line := response.readline()).endswith(b"\n"):
                yield json.loads(line)
    except (FileNotFoundError, ConnectionError):
        raise NotRunning(f"llumd is not running (nobody listens on {path})") from None
    except PermissionError:
        raise Refused(f"you may not use {path}; its group may") from None
    finally:
        connection.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llumctl`."""
    args = _parser().parse_args(argv)
    sys.exit(_guarded(args))


def _guarded(args: argparse.Namespace) -> int:
    try:
        return args.run(args) or 0
    except NotRunning as e:
        return _complain(str(e), EXIT_NOT_RUNNING)
    except Refused as e:
        return _complain(str(e), EXIT_FAILED)
    except TimeoutError:
        return _complain(f"llumd did not answer within {_TIMEOUT:.0f} s", EXIT_TIMEOUT)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(message: str, code: int) -> int:
    print(f"llumctl: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="JSON for programs")
    common.add_argument("--run-dir", type=Path, default=argparse.SUPPRESS, help="the daemon's run directory")
    common.add_argument("--socket", type=Path, default=argparse.SUPPRESS, help="the admin socket itself")
    parser = argparse.ArgumentParser("llumctl", description="See and steer a running llumd.", parents=[common])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, parents=[common])
        command.set_defaults(run=run)
        return command

    add("status", "engines, frontends and their load", _status)
    top = add("top", "status and requests, refreshed in place", _top)
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default 1")
    add("requests", "every unfinished request", _requests)
    add("cancel", "end a request", _cancel).add_argument("id", help="as `llumctl requests` shows it")
    migrate = add("migrate", "move a running request to another engine", _migrate)
    migrate.add_argument("id", help="as `llumctl requests` shows it")
    migrate.add_argument("--to", type=int, required=True, metavar="ENGINE")
    migrate.add_argument("--how", choices=tuple(MigrationMode), default=MigrationMode.LIVE, help="for comparisons")
    priority = add("priority", "give an unfinished request another priority", _priority)
    priority.add_argument("id", help="as `llumctl requests` shows it")
    priority.add_argument("value", help="high, normal, low or a number; the lower goes first")
    engines: tuple[tuple[str, str, Callable[[argparse.Namespace], int], float], ...] = (
        ("drain", "move everything off an engine and keep it empty; auto-scaling never wakes it", _drain, 30.0),
        ("undrain", "let a drained or parked engine serve again", _wake, 60.0),
        ("park", "drain an engine and end its process, memory freed; auto-scaling, if on, may wake it", _park, 30.0),
        ("wake", "let a parked or drained engine serve again; auto-scaling, if on, may park it", _wake, 60.0),
    )
    for verb, text, run, within in engines:
        command = add(verb, text, run)
        command.add_argument("engine", type=int)
        command.add_argument(
            "--within",
            type=parse_seconds,
            default=within,
            metavar="TIME",
            help=f"how long to wait; default {within:.0f}s",
        )
        command.set_defaults(verb=verb)
    events = add("events", "what the scheduler did: dispatches, moves, orders", _events)
    events.add_argument("--follow", "-f", action="store_true", help="and what it does from now on")
    events.add_argument("--request", metavar="ID", help="of this request only")
    events.add_argument("--kind", choices=KINDS, help="of this kind only")
    add("rebalance", "what the scheduler would move now, and why", _rebalance).add_argument(
        "--dry-run", action="store_true", help="the only way there is: the daemon rebalances by itself"
    )
    add("config", "every option, its value and where it was set", _config)
    return parser


def _socket(args: argparse.Namespace) -> Path:
    if getattr(args, "socket", None):
        return Path(args.socket)
    if getattr(args, "run_dir", None):
        return Path(args.run_dir) / "admin.sock"
    return Path(os.environ.get("LLUMD_RUN_DIR") or run_dir()) / "admin.sock"


def _status(args: argparse.Namespace) -> None:
    status = call(_socket(args), "GET", "/v1/status")
    print(json.dumps(status) if _wants_json(args) else "\n".join(status_lines(status)))


def _requests(args: argparse.Namespace) -> None:
    body = call(_socket(args), "GET", "/v1/requests")
    print(json.dumps(body) if _wants_json(args) else "\n".join(request_lines(body["requests"])))


def _cancel(args: argparse.Namespace) -> None:
    body = call(_socket(args), "DELETE", f"/v1/requests/{quote(args.id, safe='')}")
    print(json.dumps(body) if _wants_json(args) else f"cancelled {', '.join(body['cancelled'])}")


def _migrate(args: argparse.Namespace) -> None:
    body = call(_socket(args), "POST", f"/v1/requests/{quote(args.id, safe='')}/migrate/{args.to}?how={args.how}")
    print(json.dumps(body) if _wants_json(args) else f"ordered {', '.join(body['ordered'])} to engine {args.to}")


def _priority(args: argparse.Namespace) -> int:
    route = f"/v1/requests/{quote(args.id, safe='')}/priority/{quote(args.value, safe='')}"
    body = call(_socket(args), "POST", route)
    return _say(args, body, f"priority {body['priority']} for {', '.join(body['changed'])}")


def _drain(args: argparse.Namespace) -> int:
    """Order it, then wait until the engine is empty."""
    start = time.monotonic()
    engine, empty = _order(args, "drain", lambda e: e["state"] in ("draining", "parked") and not _held(e))
    waited, left = time.monotonic() - start, _held(engine)
    if empty:
        body = {"engine": args.engine, "empty": True, "seconds": waited}
        return _say(args, body, f"engine {args.engine} is empty after {waited:.2f} s and takes no new work")
    body = {"engine": args.engine, "empty": False, "left": left}
    return _say(args, body, f"engine {args.engine} still has {left} requests; it goes on draining") or EXIT_TIMEOUT


def _park(args: argparse.Namespace) -> int:
    """Order it, then wait until the engine is empty and its process has ended."""
    start = time.monotonic()
    engine, asleep = _order(args, "park", lambda e: e["state"] == "parked")
    waited, left = time.monotonic() - start, _held(engine)
    body = {"engine": args.engine, "parked": asleep, "seconds": waited, "left": left}
    if asleep:
        return _say(args, body, f"engine {args.engine} is parked after {waited:.2f} s; its memory is free")
    text = f"engine {args.engine} still has {left} requests; it is parked once it is empty"
    return _say(args, body, text) or EXIT_TIMEOUT


def _wake(args: argparse.Namespace) -> int:
    """Order it, then wait until the engine serves; it may only have been drained."""
    start = time.monotonic()
    engine, serving = _order(args, args.verb, lambda e: e["state"] == "serving")
    waited = time.monotonic() - start
    body = {"engine": args.engine, "serving": serving, "seconds": waited}
    if serving:
        return _say(args, body, f"engine {args.engine} serves again")
    text = f"engine {args.engine} is {engine['state']} after {waited:.0f} s; it serves as soon as it can"
    return _say(args, body, text) or EXIT_TIMEOUT


def _order(
    args: argparse.Namespace, verb: str, done: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any], bool]:
    """Have the engine change its state, and wait; its row, and whether it is done or time is up.

    Raises Refused if it cannot be done, or somebody else wishes it otherwise meanwhile.
    """
    path, start = _socket(args), time.monotonic()
    wished = call(path, "POST", f"/v1/engines/{args.engine}/{verb}")["wished"]
    while True:
        engine: dict[str, Any] = call(path, "GET", "/v1/status")["engines"][args.engine]
        if done(engine) or time.monotonic() - start > args.within:
            return engine, done(engine)
        if engine["wished"] != wished:
            raise Refused(f"engine {args.engine} is to be {engine['wished']} meanwhile")
        if engine["state"] == "failed":
            raise Refused(f"engine {args.engine} cannot run; the daemon's log says why")
        time.sleep(0.05)


def _held(engine: dict[str, Any]) -> int:
    """Requests that the engine has or expects."""
    return sum(engine.get(name, 0) for name in ("running", "waiting", "incoming", "outgoing"))


def _events(args: argparse.Namespace) -> None:
    """Coordinators come and go, the logs stay: one who follows goes on where the last answer broke off."""
    path, since = _socket(args), 0.0
    while True:
        follow = f"?follow=1&since={since!r}" if args.follow else ""
        for row in stream(path, f"/v1/events{follow}", None if since else _TIMEOUT):
            since = max(since, row["time"])
            named = not args.request or concerns(row, args.request)
            if named and args.kind in (None, row["kind"]):
                print(json.dumps(row) if _wants_json(args) else event_line(row), flush=True)
        if not args.follow:
            return
        time.sleep(0.2)


def _rebalance(args: argparse.Namespace) -> int:
    body = call(_socket(args), "GET", "/v1/rebalance")
    return _say(args, body, body["explanation"])


def _say(args: argparse.Namespace, body: dict[str, Any], text: str) -> int:
    print(json.dumps(body) if _wants_json(args) else text)
    return 0


def _config(args: argparse.Namespace) -> None:
    body = call(_socket(args), "GET", "/v1/config")
    if _wants_json(args):
        print(json.dumps(body))
        return
    rows = [[o["name"], _shown(o["value"]), o["unit"], o["origin"]] for o in body["options"]]
    print("\n".join(table(["OPTION", "VALUE", "UNIT", "SET BY"], rows)))


def _top(args: argparse.Namespace) -> None:
    path = _socket(args)
    while True:
        status = call(path, "GET", "/v1/status")
        requests = call(path, "GET", "/v1/requests")["requests"]
        if _wants_json(args):
            print(json.dumps(status | {"requests": requests}), flush=True)
        elif sys.stdout.isatty():
            _draw([*status_lines(status), "", *request_lines(requests)])
        else:
            print("\n".join([*status_lines(status), "", *request_lines(requests)]), flush=True)
            return
        time.sleep(max(0.1, args.interval))


def _draw(lines: list[str]) -> None:
    """Paint over the last picture: home, each line cleared to its end, the rest below cleared."""
    width, height = shutil.get_terminal_size()
    if len(lines) > height - 1:
        lines = [*lines[: height - 2], f"... {len(lines) - height + 2} more lines"]
    sys.stdout.write("\x1b[H" + "".join(f"{line[:width]}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def status_lines(status: dict[str, Any]) -> list[str]:
    """The daemon's status as lines of text."""
    head = f"llumd {status['version']}  {status['model']}  {status['address']}"
    headings = [
        "ENGINE",
        "DEVICE",
        "STATE",
        "PID",
        "UP",
        "RESTARTS",
        "RUN",
        "WAIT",
        "KV",
        "TOK/S",
        "STEP",
        "FREENESS",
    ]
    engines = table(headings, [_engine_row(e) for e in status["engines"]])
    others = [
        ["coordinator", status["coordinator"]],
        *([f"frontend {f['frontend']}", f] for f in status["frontends"]),
    ]
    rows = [[name, p["state"], *_alive(p), p["restarts"], p.get("active", "")] for name, p in others]
    return [head, "", *engines, "", *table(["PROCESS", "STATE", "PID", "UP", "RESTARTS", "REQUESTS"], rows)]


def _engine_row(e: dict[str, Any]) -> list[Any]:
    row = [e["engine"], e["device"], e["state"], *_alive(e), e["restarts"]]
    if "running" not in e:
        return [*row, "", "", "", "", "", ""]
    free = "max" if e["freeness"] is None else f"{e['freeness']:.0f}"
    load = [e["running"], e["waiting"], f"{e['kv_usage']:.0%}", f"{e['tokens_per_second']:.0f}"]
    return [*row, *load, f"{e['step_ms']:.1f} ms", free]


def _alive(process: dict[str, Any]) -> tuple[Any, str]:
    """Its pid and age, both empty while it is down."""
    return ("", "") if process["pid"] is None else (process["pid"], _duration(process["uptime_seconds"]))


def request_lines(requests: list[dict[str, Any]]) -> list[str]:
    """Unfinished requests as lines of text."""
    if not requests:
        return ["no unfinished requests"]
    headings = ["REQUEST", "ENGINE", "PHASE", "PROMPT", "OUTPUT", "MAX", "PRIORITY", "AGE"]
    names = ("id", "engine", "phase", "prompt_tokens", "output_tokens", "max_tokens", "priority")
    return table(headings, [[*(r[n] for n in names), _duration(r["age_seconds"])] for r in requests])


def table(headings: Sequence[str], rows: list[list[Any]]) -> list[str]:
    """Aligned columns; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(headings)]
    right = [all(isinstance(r[i], int | float) for r in rows) and bool(rows) for i in range(len(headings))]

    def line(row: list[str]) -> str:
        parts = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(parts).rstrip()

    return [line(list(headings)), *(line(row) for row in cells)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _wants_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


if __name__ == "__main__":
    main()
