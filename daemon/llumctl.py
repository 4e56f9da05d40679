"""The `llumctl` command: see and steer a running daemon through its admin socket.

Exit codes: 0 done, 1 the daemon refused or failed, 2 usage, 3 no daemon is running, 4 it did not answer in time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from daemon.config import parse_seconds, run_dir

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
    migrate.add_argument("--how", choices=("live", "blocking", "recompute"), default="live", help="for comparisons")
    drain = add("drain", "move everything off an engine and keep it empty", _drain)
    drain.add_argument("engine", type=int)
    drain.add_argument(
        "--within", type=parse_seconds, default=30.0, metavar="TIME", help="how long to wait; default 30s"
    )
    add("undrain", "let a drained engine serve again", _undrain).add_argument("engine", type=int)
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


def _drain(args: argparse.Namespace) -> int:
    """Order it, then wait until the engine is empty."""
    path, start = _socket(args), time.monotonic()
    call(path, "POST", f"/v1/engines/{args.engine}/drain")
    while True:
        engine = call(path, "GET", "/v1/status")["engines"][args.engine]
        waited = time.monotonic() - start
        left = sum(engine.get(name, 0) for name in ("running", "waiting", "incoming", "outgoing"))
        if engine["state"] == "draining" and not left:
            return _say(
                args,
                {"engine": args.engine, "empty": True, "seconds": waited},
                f"engine {args.engine} is empty after {waited:.2f} s and takes no new work",
            )
        if waited > args.within:
            _say(
                args,
                {"engine": args.engine, "empty": False, "left": left},
                f"engine {args.engine} still has {left} requests; it goes on draining",
            )
            return EXIT_TIMEOUT
        time.sleep(0.05)


def _undrain(args: argparse.Namespace) -> int:
    body = call(_socket(args), "POST", f"/v1/engines/{args.engine}/undrain")
    return _say(args, body, f"engine {args.engine} serves again")


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
    rows = [
        [name, p["state"], p["pid"], _duration(p["uptime_seconds"]), p["restarts"], p.get("active", "")]
        for name, p in others
    ]
    return [head, "", *engines, "", *table(["PROCESS", "STATE", "PID", "UP", "RESTARTS", "REQUESTS"], rows)]


def _engine_row(e: dict[str, Any]) -> list[Any]:
    row = [e["engine"], e["device"], e["state"], e["pid"], _duration(e["uptime_seconds"]), e["restarts"]]
    if "running" not in e:
        return [*row, "", "", "", "", "", ""]
    free = "max" if e["freeness"] is None else f"{e['freeness']:.0f}"
    load = [e["running"], e["waiting"], f"{e['kv_usage']:.0%}", f"{e['tokens_per_second']:.0f}"]
    return [*row, *load, f"{e['step_ms']:.1f} ms", free]


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
