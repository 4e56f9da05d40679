"""The `llumctl` command: show and control a running daemon through its admin socket.

Exit codes: 0 done, 1 refused or failed, 2 usage error, 3 no daemon is running, 4 no answer or no result in time,
130 interrupted while waiting. With --json an error is an object with `error` and `code` on standard output.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from daemon import __version__
from daemon.cli import engine_orders, restarts
from daemon.cli.admin_client import TIMEOUT, CtlError, call, read, stream
from daemon.cli.engine_orders import VERBS
from daemon.cli.format import RequestFilter, event_line, option_lines, request_lines, status_lines
from daemon.cli.messages import print_progress
from daemon.directories import run_dir
from daemon.enums import MigrationMode
from daemon.ipc.events import KINDS
from daemon.units import parse_seconds

Run = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `llumctl` command."""
    _prepare_output()
    sys.exit(_run(sys.argv[1:] if argv is None else list(argv)))


def _prepare_output() -> None:
    """Let output work without a standard stream, and in locales that do not know a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed the descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(argv: list[str]) -> int:
    """Run one command and return the exit code. Output that cannot be written is an error of its own."""
    try:
        code = _run_command(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_output()
        return 0
    except OSError as e:
        _discard_output()
        print(f"llumctl: cannot write the output: {e.strerror}", file=sys.stderr)
        return CtlError.exit_code


def _run_command(argv: list[str]) -> int:
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        return 0
    except CtlError as e:
        return _fail(e, as_json="--json" in argv)
    except SystemExit as e:  # after --help or --version
        return int(e.code or 0)
    except KeyboardInterrupt:
        return 0  # the usual end of `top` and `events --follow`; a wait for an engine raises Interrupted


class UsageError(CtlError):
    """The arguments are wrong. `usage`: the line that shows how to write them."""

    exit_code = 2

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message, "usage")
        self.usage = usage


def _fail(error: CtlError, *, as_json: bool) -> int:
    """Print the error, as text on standard error or as JSON on standard output. Return the exit code."""
    if as_json:
        result = error.result if isinstance(error, engine_orders.TooLate) else {}
        print(json.dumps(result | {"error": str(error), "code": error.code}), flush=True)
    else:
        usage = error.usage if isinstance(error, UsageError) else ""
        print(f"{usage}llumctl: {error}", file=sys.stderr)
    return error.exit_code


def _discard_output() -> None:
    """Send what is still buffered nowhere; otherwise Python reports at its end that it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- arguments ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("llumctl").strip()
        raise UsageError(f"{command}: {message}" if command else message, self.format_usage())


def _parser() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, errors too")
    common.add_argument(
        "--run-dir", type=_path, default=argparse.SUPPRESS, metavar="DIR", help="run directory of the daemon"
    )
    common.add_argument(
        "--socket", type=_path, default=argparse.SUPPRESS, metavar="PATH", help="admin socket of the daemon"
    )
    parser = _Parser("llumctl", description="Show and control a running llumd.", parents=[common])
    parser.add_argument("--version", action="version", version=f"llumctl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, text: str, run: Run) -> _Parser:
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description, parents=[common])
        command.set_defaults(run=run)
        return command

    add("status", "show engines, frontends and their load", _status)
    top = add("top", "show status and requests, refreshed in place until Ctrl-C", _top)
    top.add_argument(
        "--interval", type=_interval, default=1.0, metavar="TIME", help="refresh period, at least 100ms (default: 1s)"
    )
    _add_request_commands(add)
    _add_engine_commands(add)
    _add_restart(add)
    events = add("events", "show what the scheduler did: dispatches, migrations, orders", _events)
    events.add_argument("--follow", "-f", action="store_true", help="continue with new events until Ctrl-C")
    events.add_argument(
        "--request", type=_name, metavar="ID", help="show only events of this request; its id, or its x-request-id"
    )
    events.add_argument("--kind", choices=KINDS, metavar="KIND", help=f"show only this kind: {', '.join(KINDS)}")
    rebalance = add("rebalance", "show what the scheduler would migrate now, and why", _rebalance)
    rebalance.add_argument("--dry-run", action="store_true", help="always on: the daemon itself starts migrations")
    add("config", "show every option, its value and its source", _config)
    add("reload", "read the API key file again; a file with an error changes nothing", _reload)
    return parser


def _add_request_commands(add: Callable[[str, str, Run], _Parser]) -> None:
    def add_id(command: _Parser) -> None:
        command.add_argument(
            "id", type=_name, metavar="ID", help="request id from `llumctl requests`, or its x-request-id"
        )

    add("requests", "show every unfinished request", _requests)
    add_id(add("cancel", "end a request", _cancel))
    migrate = add("migrate", "move a running request to another engine", _migrate)
    add_id(migrate)
    migrate.add_argument("--to", type=_number, required=True, metavar="ENGINE", help="number of the new engine")
    how = "how the request moves (default: live); the others are for comparison"
    migrate.add_argument("--how", choices=tuple(map(str, MigrationMode)), default=MigrationMode.LIVE, help=how)
    priority = add("priority", "change the priority of an unfinished request", _priority)
    add_id(priority)
    help_text = "high, normal, low or a number from -100 to 100; a lower number goes first"
    priority.add_argument("value", type=_name, metavar="PRIORITY", help=help_text)


def _add_engine_commands(add: Callable[[str, str, Run], _Parser]) -> None:
    for name, verb in VERBS.items():
        command = add(name, verb.help, _order)
        command.add_argument("engine", type=_number, metavar="ENGINE", help="number of the engine")
        default = f"{verb.within:.0f}s" if verb.within is not None else "the daemon's load_timeout"
        text = (
            f"how long to wait for the effect, for example 30s or 2m (default: {default}); the order stands after it"
        )
        wait = command.add_mutually_exclusive_group()
        wait.add_argument("--within", type=_duration, metavar="TIME", help=text)
        wait.add_argument("--no-wait", action="store_true", help="give the order and return at once")
        command.set_defaults(verb=name)


def _add_restart(add: Callable[[str, str, Run], _Parser]) -> None:
    text = "replace processes one by one, for example after an update; streams go on"
    command = add("restart", text, _restart)
    command.add_argument(
        "what", choices=("engine", "frontend", "coordinator", restarts.ALL), help="which process, or all of them"
    )
    command.add_argument("number", type=_number, nargs="?", metavar="N", help="number of the engine or frontend")
    help_text = "how long each engine may take to become empty by migration (default: 30s)"
    command.add_argument("--within", type=_duration, default=30.0, metavar="TIME", help=help_text)


def _duration(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _interval(text: str) -> float:
    return max(0.1, _duration(text))


def _number(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an engine; `llumctl status` lists them")
    return int(text)


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))


# -- commands ----------------------------------------------------------------------------------


def _socket(args: argparse.Namespace) -> Path:
    if getattr(args, "socket", None):
        return Path(args.socket)
    if getattr(args, "run_dir", None):
        return Path(args.run_dir) / "admin.sock"
    return Path(os.environ.get("LLUMD_RUN_DIR") or run_dir()) / "admin.sock"


def _status(args: argparse.Namespace) -> None:
    status = read(_socket(args), "/v1/status")
    _print(args, status, "\n".join(status_lines(status, _width())))


def _requests(args: argparse.Namespace) -> None:
    body = read(_socket(args), "/v1/requests")
    _print(args, body, "\n".join(request_lines(body["requests"], _width())))


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


def _order(args: argparse.Namespace) -> None:
    """Give an order about an engine. Unless --no-wait is given, wait until the engine has the desired state."""
    path, name, number = _socket(args), args.verb, args.engine
    if args.no_wait:
        desired = engine_orders.order(path, name, number)
        text = f"engine {number} is to be {desired}; `llumctl status` shows its state"
        _print(args, {"engine": number, "desired": desired}, text)
        return
    write = _no_progress if _wants_json(args) else print_progress
    result = engine_orders.carry_out(path, name, number, args.within, write)
    _print(args, result, VERBS[name].done.format(**result))


def _restart(args: argparse.Namespace) -> None:
    numbered = args.what in ("engine", "frontend")
    if numbered != (args.number is not None):
        text = f"restart: {args.what} needs a number" if numbered else f"restart: {args.what} has no number"
        raise UsageError(text, "usage: llumctl restart engine N|frontend N|coordinator|all\n")
    write = _no_progress if _wants_json(args) else print_progress
    rows = restarts.restart(_socket(args), args.what, args.number, args.within, write)
    replaced = ", ".join(row["process"] for row in rows if row["restarted"])
    _print(args, {"processes": rows}, f"replaced: {replaced or 'none'}")


def _no_progress(_line: str) -> None:
    pass


def _events(args: argparse.Namespace) -> None:
    """Print events. With --follow, reconnect to a new coordinator and continue after the last event.

    The event rings outlive coordinators.
    """
    path = _socket(args)
    wanted = RequestFilter(args.request) if args.request else None
    if not args.follow:
        rows = list(stream(path, "/v1/events"))
        for row in rows:
            if wanted is not None:
                wanted.learn(row)
        shown = [row for row in rows if _print_event(args, row, wanted)]
        if wanted is not None and not shown and not _wants_json(args):
            print(f"no event of {args.request} is kept; each process keeps its latest events only", file=sys.stderr)
        return
    since = 0.0
    while True:
        for row in stream(path, f"/v1/events?follow=1&since={since!r}", None if since else TIMEOUT):
            since = max(since, row["time"])
            if wanted is not None:
                wanted.learn(row)
            _print_event(args, row, wanted)
        time.sleep(0.2)


def _print_event(args: argparse.Namespace, row: dict[str, Any], wanted: RequestFilter | None) -> bool:
    """Print the event if it is wanted. Return True if it is."""
    if args.kind not in (None, row["kind"]) or (wanted is not None and not wanted.concerns(row)):
        return False
    print(json.dumps(row) if _wants_json(args) else event_line(row), flush=True)
    return True


def _rebalance(args: argparse.Namespace) -> None:
    body = read(_socket(args), "/v1/rebalance")
    _print(args, body, body["explanation"])


def _config(args: argparse.Namespace) -> None:
    body = read(_socket(args), "/v1/config")
    _print(args, body, "\n".join(option_lines(body["options"])))


def _reload(args: argparse.Namespace) -> None:
    body = call(_socket(args), "POST", "/v1/reload")
    what = ", ".join(f"{body[name]} {name}" for name in ("added", "removed", "changed"))
    _print(args, body, f"accepted keys: {body['keys']} ({what}); named tenants: {body['tenants']}")


def _top(args: argparse.Namespace) -> None:
    path = _socket(args)
    while True:
        status = read(path, "/v1/status")
        requests = read(path, "/v1/requests")["requests"]
        lines = [*status_lines(status, _width()), "", *request_lines(requests, _width())]
        if _wants_json(args):
            print(json.dumps(status | {"requests": requests}), flush=True)
        elif sys.stdout.isatty():
            _draw(lines)
        else:
            print("\n".join(lines), flush=True)
            return
        time.sleep(args.interval)


def _width() -> int:
    """Return the width of the terminal; 0 if the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def _draw(lines: list[str]) -> None:
    """Overwrite the screen from its top left corner. Clear the rest of each line, and below the last line."""
    width, height = shutil.get_terminal_size()
    if len(lines) > height - 1:
        lines = [*lines[: max(0, height - 2)], f"... {len(lines) - height + 2} more lines"]
    sys.stdout.write("\x1b[H" + "".join(f"{line[:width]}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def _print(args: argparse.Namespace, body: dict[str, Any], text: str) -> None:
    print(json.dumps(body) if _wants_json(args) else text)


def _wants_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


if __name__ == "__main__":
    main()
