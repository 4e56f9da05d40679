"""The `llumctl` command: show and control a running daemon through its admin socket.

Exit codes: 0 success, 1 the daemon refused or failed, 2 usage error, 3 no daemon is running, 4 no answer in time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from daemon.cli.admin_client import TIMEOUT, NotRunning, Refused, call, stream
from daemon.cli.format import concerns, event_line, option_lines, request_lines, status_lines
from daemon.config import run_dir
from daemon.enums import MigrationMode
from daemon.ipc.events import KINDS
from daemon.units import parse_seconds

EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_TIMEOUT = 1, 3, 4

Run = Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `llumctl` command."""
    args = _parser().parse_args(argv)
    sys.exit(_run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args) or 0
    except NotRunning as e:
        return _fail(str(e), EXIT_NOT_RUNNING)
    except Refused as e:
        return _fail(str(e), EXIT_FAILED)
    except TimeoutError:
        return _fail(f"llumd did not answer within {TIMEOUT:.0f} s", EXIT_TIMEOUT)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, code: int) -> int:
    print(f"llumctl: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    common.add_argument("--run-dir", type=Path, default=argparse.SUPPRESS, help="run directory of the daemon")
    common.add_argument("--socket", type=Path, default=argparse.SUPPRESS, help="admin socket of the daemon")
    parser = argparse.ArgumentParser("llumctl", description="Show and control a running llumd.", parents=[common])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, run: Run) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, parents=[common])
        command.set_defaults(run=run)
        return command

    add("status", "show engines, frontends and their load", _status)
    top = add("top", "show status and requests, refreshed in place", _top)
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="refresh period (default: 1)")
    _add_request_commands(add)
    _add_engine_commands(add)
    events = add("events", "show what the scheduler did: dispatches, migrations, orders", _events)
    events.add_argument("--follow", "-f", action="store_true", help="continue with new events")
    events.add_argument("--request", metavar="ID", help="only events of this request")
    events.add_argument("--kind", choices=KINDS, help="only events of this kind")
    rebalance = add("rebalance", "show what the scheduler would migrate now, and why", _rebalance)
    rebalance.add_argument("--dry-run", action="store_true", help="always on: the daemon itself starts migrations")
    add("config", "show every option, its value and its source", _config)
    add("reload", "read the API key file again; a file with an error changes nothing", _reload)
    return parser


def _add_request_commands(add: Callable[[str, str, Run], argparse.ArgumentParser]) -> None:
    id_help = "request id from `llumctl requests`"
    add("requests", "show every unfinished request", _requests)
    add("cancel", "end a request", _cancel).add_argument("id", help=id_help)
    migrate = add("migrate", "move a running request to another engine", _migrate)
    migrate.add_argument("id", help=id_help)
    migrate.add_argument("--to", type=int, required=True, metavar="ENGINE", help="destination")
    how = "how the request moves (default: live); the others are for comparison"
    migrate.add_argument("--how", choices=tuple(MigrationMode), default=MigrationMode.LIVE, help=how)
    priority = add("priority", "change the priority of an unfinished request", _priority)
    priority.add_argument("id", help=id_help)
    priority.add_argument("value", help="high, normal, low or a number; a lower number goes first")


def _add_engine_commands(add: Callable[[str, str, Run], argparse.ArgumentParser]) -> None:
    engines: tuple[tuple[str, str, Run, float], ...] = (
        ("drain", "move all requests off an engine and keep it empty; auto-scaling does not wake it", _drain, 30.0),
        ("undrain", "let a drained or parked engine serve again", _wake, 60.0),
        ("park", "drain an engine, end its process and free its memory; auto-scaling may wake it", _park, 30.0),
        ("wake", "let a parked or drained engine serve again; auto-scaling may park it", _wake, 60.0),
    )
    for verb, text, run, within in engines:
        command = add(verb, text, run)
        command.add_argument("engine", type=int, help="number of the engine")
        wait = f"how long to wait, for example 30s or 2m (default: {within:.0f}s)"
        command.add_argument("--within", type=_duration, default=within, metavar="TIME", help=wait)
        command.set_defaults(verb=verb)


def _duration(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _socket(args: argparse.Namespace) -> Path:
    if getattr(args, "socket", None):
        return Path(args.socket)
    if getattr(args, "run_dir", None):
        return Path(args.run_dir) / "admin.sock"
    return Path(os.environ.get("LLUMD_RUN_DIR") or run_dir()) / "admin.sock"


def _status(args: argparse.Namespace) -> None:
    status = call(_socket(args), "GET", "/v1/status")
    _print(args, status, "\n".join(status_lines(status)))


def _requests(args: argparse.Namespace) -> None:
    body = call(_socket(args), "GET", "/v1/requests")
    _print(args, body, "\n".join(request_lines(body["requests"])))


def _cancel(args: argparse.Namespace) -> None:
    body = call(_socket(args), "DELETE", f"/v1/requests/{quote(args.id, safe='')}")
    _print(args, body, f"cancelled {', '.join(body['cancelled'])}")


def _migrate(args: argparse.Namespace) -> None:
    body = call(_socket(args), "POST", f"/v1/requests/{quote(args.id, safe='')}/migrate/{args.to}?how={args.how}")
    _print(args, body, f"ordered {', '.join(body['ordered'])} to engine {args.to}")


def _priority(args: argparse.Namespace) -> None:
    route = f"/v1/requests/{quote(args.id, safe='')}/priority/{quote(args.value, safe='')}"
    body = call(_socket(args), "POST", route)
    _print(args, body, f"priority {body['priority']} for {', '.join(body['changed'])}")


def _drain(args: argparse.Namespace) -> int:
    """Order the engine to drain, then wait until it is empty."""
    start = time.monotonic()
    engine, empty = _order(args, "drain", lambda e: e["state"] in ("draining", "parked") and not _num_requests(e))
    waited, left = time.monotonic() - start, _num_requests(engine)
    if empty:
        body = {"engine": args.engine, "empty": True, "seconds": waited}
        _print(args, body, f"engine {args.engine} is empty after {waited:.2f} s and takes no new requests")
        return 0
    body = {"engine": args.engine, "empty": False, "left": left}
    _print(args, body, f"engine {args.engine} still has {left} requests; it goes on draining")
    return EXIT_TIMEOUT


def _park(args: argparse.Namespace) -> int:
    """Order the engine to park, then wait until it is empty and its process has ended."""
    start = time.monotonic()
    engine, parked = _order(args, "park", lambda e: e["state"] == "parked")
    waited, left = time.monotonic() - start, _num_requests(engine)
    body = {"engine": args.engine, "parked": parked, "seconds": waited, "left": left}
    if parked:
        _print(args, body, f"engine {args.engine} is parked after {waited:.2f} s; its memory is free")
        return 0
    _print(args, body, f"engine {args.engine} still has {left} requests; it parks when it is empty")
    return EXIT_TIMEOUT


def _wake(args: argparse.Namespace) -> int:
    """Order the engine to serve, then wait until it does. It may be parked or only drained."""
    start = time.monotonic()
    engine, serving = _order(args, args.verb, lambda e: e["state"] == "serving")
    waited = time.monotonic() - start
    body = {"engine": args.engine, "serving": serving, "seconds": waited}
    if serving:
        _print(args, body, f"engine {args.engine} serves again")
        return 0
    _print(args, body, f"engine {args.engine} is {engine['state']} after {waited:.0f} s; it serves as soon as it can")
    return EXIT_TIMEOUT


def _order(
    args: argparse.Namespace, verb: str, done: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any], bool]:
    """Set the desired state of the engine and wait. Return its status and True if `done`, or False after `--within`.

    Raises Refused if the engine cannot reach the state, or if another order changes the desired state meanwhile.
    """
    path, start = _socket(args), time.monotonic()
    desired = call(path, "POST", f"/v1/engines/{args.engine}/{verb}")["desired"]
    while True:
        engine: dict[str, Any] = call(path, "GET", "/v1/status")["engines"][args.engine]
        if done(engine) or time.monotonic() - start > args.within:
            return engine, done(engine)
        if engine["desired"] != desired:
            raise Refused(f"another order changed the desired state of engine {args.engine} to {engine['desired']}")
        if engine["state"] == "failed":
            raise Refused(f"engine {args.engine} cannot run; read the log of the daemon for the reason")
        time.sleep(0.05)


def _num_requests(engine: dict[str, Any]) -> int:
    """Return the number of requests that the engine holds or that are on their way to it."""
    return sum(engine.get(name, 0) for name in ("running", "waiting", "incoming", "outgoing"))


def _events(args: argparse.Namespace) -> None:
    """Print events. With --follow, reconnect to a new coordinator and continue after the last event.

    The event rings outlive coordinators.
    """
    path, since = _socket(args), 0.0
    while True:
        follow = f"?follow=1&since={since!r}" if args.follow else ""
        for row in stream(path, f"/v1/events{follow}", None if since else TIMEOUT):
            since = max(since, row["time"])
            wanted = not args.request or concerns(row, args.request)
            if wanted and args.kind in (None, row["kind"]):
                print(json.dumps(row) if _wants_json(args) else event_line(row), flush=True)
        if not args.follow:
            return
        time.sleep(0.2)


def _rebalance(args: argparse.Namespace) -> None:
    body = call(_socket(args), "GET", "/v1/rebalance")
    _print(args, body, body["explanation"])


def _config(args: argparse.Namespace) -> None:
    body = call(_socket(args), "GET", "/v1/config")
    _print(args, body, "\n".join(option_lines(body["options"])))


def _reload(args: argparse.Namespace) -> None:
    body = call(_socket(args), "POST", "/v1/reload")
    what = ", ".join(f"{body[name]} {name}" for name in ("added", "removed", "changed"))
    _print(args, body, f"accepted keys: {body['keys']} ({what}); named tenants: {body['tenants']}")


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
    """Overwrite the screen from its top left corner. Clear the rest of each line, and below the last line."""
    width, height = shutil.get_terminal_size()
    if len(lines) > height - 1:
        lines = [*lines[: height - 2], f"... {len(lines) - height + 2} more lines"]
    sys.stdout.write("\x1b[H" + "".join(f"{line[:width]}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def _print(args: argparse.Namespace, body: dict[str, Any], text: str) -> None:
    print(json.dumps(body) if _wants_json(args) else text)


def _wants_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


if __name__ == "__main__":
    main()
