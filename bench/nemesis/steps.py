"""The named steps at which a process can be killed or stopped: which function of the daemon begins or ends each.

`hooks/sitecustomize.py` wraps these functions in the daemon's processes. A step is *armed* by a file with its number
and a byte in a file that all processes map; the first process that comes to it deletes the file, and acts.
"""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """`role`: of the processes that come to it. `after`: when the function returns; otherwise before it begins.

    `if_true`: only if the function returns something true.
    """

    role: str
    module: str
    function: str
    after: bool = False
    if_true: bool = False


def _around(name: str, role: str, module: str, function: str) -> dict[str, Step]:
    return {f"before {name}": Step(role, module, function), f"after {name}": Step(role, module, function, True)}


def _engine(name: str, module: str, function: str) -> dict[str, Step]:
    return _around(name, "engine", f"daemon.engine.{module}", function)


def _frontend(name: str, module: str, function: str) -> dict[str, Step]:
    return _around(name, "frontend", f"daemon.{module}", function)


MIGRATION_STEPS = {
    **_engine("the reservation is asked for", "migration.source", "Source._reserve"),
    **_engine("the reservation is made", "migration.destination", "Destination.on_reserve"),
    **_engine("the reservation arrives", "migration.source", "Source.on_reserved"),
    **_engine("a copy begins", "migration.executor", "MigrationExecutor._copy"),
    **_engine("a copy's end is noted", "migration.source", "Source.on_copied"),
    **_engine("the request freezes", "migration.source", "Source._freeze"),
    **_engine("the handover", "migration.source", "Source._hand_over"),
    **_engine("the handover arrives", "migration.destination", "Destination.on_handover"),
    **_engine("the grant arrives", "migration.llumlet", "Llumlet.on_grant"),
    **_engine("the release arrives", "migration.llumlet", "Llumlet.on_release"),
    "after a message to a peer": Step("engine", "daemon.engine.migration.executor", "_PeerOutbox.flush", True, True),
    "after a message to a frontend": Step(
        "engine", "daemon.engine.frontend_outbox", "FrontendOutbox._flush_notes", True, True
    ),
    **_frontend("a takeover is recorded", "api.request_tracker", "RequestTracker._record_takeover"),
    **_frontend("the output of a claim is journaled", "api.request_state", "RequestState.append"),
    **_frontend("a new owner is journaled", "api.request_state", "RequestState.assign"),
    **_frontend("an order to an engine", "api.request_tracker", "RequestTracker._send"),
}
"""Steps of moves, in engines and frontends."""

RESPONSE_STEPS = {
    **_frontend("a request is submitted", "api.request_tracker", "RequestTracker.submit"),
    **_frontend("a connection is kept", "ipc.kept_sockets", "KeptSockets.hold"),
    **_frontend("a response is guarded", "api.response_guard", "ResponseGuard.open"),
    **_frontend("an outbox slot opens", "ipc.outbox", "Outbox.open"),
    **_frontend("bytes are committed", "ipc.outbox", "OutboxSlot.commit"),
    **_frontend("bytes go to the socket", "api.outbox_writer", "OutboxWriter._write_now"),
    **_frontend("bytes wait for room", "api.outbox_writer", "OutboxWriter._write_later"),
    **_frontend("a ring of the outbox grows", "ipc.outbox", "OutboxSlot.grow"),
    **_frontend("output is journaled", "ipc.journal", "Journal.append"),
    **_frontend("an end is journaled", "ipc.journal", "Journal.end"),
    **_frontend("the rings of engines are read", "api.request_tracker", "RequestTracker._read_outputs"),
    **_frontend("the last bytes", "api.outbox_writer", "OutboxWriter.write_eof"),
    **_frontend("an outbox slot closes", "ipc.outbox", "OutboxSlot.close"),
    **_frontend("the requests of a response are released", "api.stream_group", "StreamGroup.__exit__"),
    **_frontend("a journal slot closes", "ipc.journal", "Journal.close"),
}
"""Steps in the life of a response."""

SUCCESSION_STEPS = {
    **_frontend("the journal is adopted", "api.request_tracker", "RequestTracker.__init__"),
    **_frontend("the connections are adopted", "ipc.kept_sockets", "KeptSockets.adopt"),
    **_frontend("a response is adopted", "api.succession", "Succession._adopt"),
    **_frontend("a response is begun again", "api.succession", "Succession._run"),
    **_frontend("text and counts are brought back", "api.render.answer", "Answer.resume"),
    **_frontend(
        "requests without a response are cancelled", "api.request_tracker", "RequestTracker.abandon_unclaimed"
    ),
    **_frontend("all is adopted", "api.succession", "Succession.start"),
    **_frontend("new connections are accepted", "api.frontend", "ConnectionAcceptor.start"),
    **_frontend("engines are told what they own", "api.request_tracker", "RequestTracker._send_owned"),
    **_frontend("the connection of an adopted response ends", "api.succession", "Succession._hang_up"),
}
"""Steps of a successor, after the death of a frontend or its orderly hand-over."""

STEPS = MIGRATION_STEPS | RESPONSE_STEPS | SUCCESSION_STEPS
NUMBERS = {name: number for number, name in enumerate(STEPS)}
ARMED = "armed"  # file: one byte for each step
HIT = ".hit"  # suffix of the file with "pid time" of the process that came to an armed step
