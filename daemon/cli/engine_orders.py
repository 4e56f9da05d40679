"""The orders drain, undrain, park and wake: set the desired state of an engine, then wait until the engine has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from daemon.cli.admin_client import CtlError, Lost, NoAnswer, NotRunning, Refused, call, read

Row = dict[str, Any]

EXIT_TIMEOUT, EXIT_INTERRUPTED = 4, 130
GRACE = 5.0  # seconds beyond the limit for an engine that is nearly in the state
FIRST_REPORT, REPORT_PERIOD = 1.0, 10.0  # seconds until the first progress line, and between two equal ones
_POLL = 0.05  # seconds


class Verb(NamedTuple):
    """An order about an engine.

    `within`: default limit of the wait, seconds; None: the daemon's `load_timeout`. `reached`: the engine has the
    state. `near`: only a moment is missing. `key`: what the engine is then, and the name of the result in JSON.
    `done`: text. `then`: what an engine does that is late. `back`: the order that takes this one back.
    """

    help: str
    within: float | None
    reached: Callable[[Row], bool]
    near: Callable[[Row], bool]
    key: str
    done: str
    then: str
    back: str


def num_requests(engine: Row) -> int:
    """Return the number of requests that the engine holds or that are on their way to it."""
    running = max(engine.get("running", 0), engine.get("outgoing", 0))  # those that migrate away are running too
    return int(running + engine.get("waiting", 0) + engine.get("incoming", 0))


def _empty(engine: Row) -> bool:
    return not num_requests(engine)


def _drained(engine: Row) -> bool:
    return engine["state"] in ("draining", "parking", "parked") and _empty(engine)


def _emptied(engine: Row) -> bool:
    """The engine holds nothing; it only has to read the order, or to end its process."""
    return engine["state"] in ("serving", "draining", "parking") and _empty(engine)


_SERVES = Verb(
    help="",
    within=None,
    reached=lambda engine: bool(engine["state"] == "serving"),
    near=lambda engine: bool(engine["state"] == "draining"),
    key="serving",
    done="engine {engine} serves again",
    then="it serves as soon as it can",
    back="park",
)
VERBS = {
    "drain": Verb(
        help="move all requests off an engine and keep it empty; auto-scaling does not wake it",
        within=30.0,
        reached=_drained,
        near=_emptied,
        key="empty",
        done="engine {engine} is empty after {seconds:.2f} s and takes no new requests",
        then="it goes on draining",
        back="undrain",
    ),
    "undrain": _SERVES._replace(help="let a drained or parked engine serve again"),
    "park": Verb(
        help="drain an engine, end its process and free its memory; auto-scaling may wake it",
        within=30.0,
        reached=lambda engine: bool(engine["state"] == "parked"),
        near=_emptied,
        key="parked",
        done="engine {engine} is parked after {seconds:.2f} s; its memory is free",
        then="it parks when it is empty",
        back="wake",
    ),
    "wake": _SERVES._replace(help="let a parked or drained engine serve again; auto-scaling may park it"),
}


class Look(Enum):
    """What one look at an engine says."""

    DONE = "done"
    WAIT = "wait"
    LATE = "late"


class TooLate(CtlError):
    """The engine is not in the state yet. `result`: the JSON answer."""

    exit_code = EXIT_TIMEOUT

    def __init__(self, message: str, result: Row) -> None:
        super().__init__(message, "timeout")
        self.result = result


class Interrupted(CtlError):
    """The operator has ended the wait; the order stands."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, message: str) -> None:
        super().__init__(message, "interrupted")


def judge(verb: Verb, desired: str, engine: Row, waited: float, within: float) -> Look:
    """Return what the engine's status row says `waited` seconds after an order with the limit `within`.

    `desired`: the state that the order has set. Read the row after the clock: then an engine that reaches the state
    before the limit is never late. Raises Refused if another order replaces this one, or if the engine cannot run.
    """
    if engine["desired"] != desired:
        text = f"another order has changed the desired state of engine {engine['engine']} to {engine['desired']}"
        raise Refused(text, "order_replaced")
    if verb.reached(engine):
        return Look.DONE
    if engine["state"] == "failed":
        text = f"engine {engine['engine']} cannot run; the log of the daemon says why"
        raise Refused(text, "engine_failed")
    limit = within + (GRACE if verb.near(engine) else 0.0)
    return Look.LATE if waited > limit else Look.WAIT


def progress(engine: Row) -> str:
    """Return in a few words what the engine is doing."""
    state, left = engine["state"], num_requests(engine)
    match state:
        case "dead":
            return f"its process has died ({engine['last_exit']}) and will be started again"
        case "starting":
            return "its process starts"
        case "loading":
            return "it loads the model"
        case "parking" if not left:
            return "it is empty; its process ends"
        case "parked":
            return "it is parked; its process will be started"
    return f"it is {state}, with {left} request{'' if left == 1 else 's'} left"


class Reporter:
    """Prints what the engine is doing when that changes, and after REPORT_PERIOD; nothing in the first second."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._text = ""
        self._next = FIRST_REPORT

    def report(self, number: int, text: str, waited: float) -> None:
        """Report `text` about engine `number`, `waited` seconds after the order."""
        if waited < FIRST_REPORT or (text == self._text and waited < self._next):
            return
        self._write(f"engine {number}: {text} ({waited:.0f} s)")
        self._text, self._next = text, waited + REPORT_PERIOD


def order(path: Path, name: str, number: int) -> str:
    """Give the order `name` for engine `number`. Return the desired state that it has set."""
    return str(call(path, "POST", f"/v1/engines/{number}/{name}")["desired"])


def carry_out(path: Path, name: str, number: int, within: float | None, write: Callable[[str], None]) -> Row:
    """Give the order `name` for engine `number` and wait for its effect. Return the JSON answer.

    `within`: limit of the wait, seconds; None: the default. `write`: prints a line of progress. Raises TooLate,
    Interrupted, NotRunning or Refused.
    """
    verb = VERBS[name]
    desired, start = order(path, name, number), time.monotonic()
    try:
        limit = within if within is not None else verb.within if verb.within is not None else load_timeout(path)
        return _wait(path, verb, desired, number, start, limit, Reporter(write))
    except KeyboardInterrupt:
        text = f"interrupted; the order to {name} engine {number} stands ({_way_back(verb, number)})"
        raise Interrupted(text) from None
    except NotRunning:
        raise NotRunning(f"llumd has ended while engine {number} was on its way to {desired}") from None


def _wait(path: Path, verb: Verb, desired: str, number: int, start: float, within: float, reporter: Reporter) -> Row:
    while True:
        waited = time.monotonic() - start
        engine = _engine(path, number, within - waited)
        look = judge(verb, desired, engine, waited, within)
        if look is Look.WAIT:
            reporter.report(number, progress(engine), waited)
            time.sleep(_POLL)
            continue
        seconds, left = time.monotonic() - start, num_requests(engine)
        done = look is Look.DONE
        result = {"engine": number, verb.key: done, "state": engine["state"], "seconds": seconds, "left": left}
        if done:
            return result
        text = f"engine {number} is not {verb.key} after {seconds:.0f} s: {progress(engine)}; {verb.then}"
        raise TooLate(f"{text} ({_way_back(verb, number)}, `llumctl status` shows its state)", result)


def _way_back(verb: Verb, number: int) -> str:
    return f"`llumctl {verb.back} {number}` takes the order back"


def _engine(path: Path, number: int, seconds: float) -> Row:
    """Return the status row of an engine. Ask again for up to `seconds` while the coordinator does not answer."""
    end = time.monotonic() + seconds
    while True:
        try:
            row: Row = read(path, "/v1/status")["engines"][number]
            return row
        except (Lost, NoAnswer):
            if time.monotonic() > end:
                raise


def load_timeout(path: Path) -> float:
    """Return the time that the daemon gives an engine to start, seconds."""
    options = {option["name"]: option["value"] for option in read(path, "/v1/config")["options"]}
    return float(options["load_timeout"])
