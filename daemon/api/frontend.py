"""The frontend process: one event loop runs the HTTP server, the doorbell and the request tracker."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import uvloop
from aiohttp import web

from daemon.api.app import build_app
from daemon.api.auth import SharedKeys
from daemon.api.body_memory import keep_large_blocks_apart
from daemon.api.connections import Connections
from daemon.api.kept_streams import KeptStreams
from daemon.api.metrics import DaemonSnapshot, FrontendMetrics
from daemon.api.origins import OriginPolicy
from daemon.api.other_frontends import OtherFrontends
from daemon.api.rate_limited_log import RateLimitedLog
from daemon.api.request_tracker import RequestTracker
from daemon.api.response_guard import ResponseGuard
from daemon.api.service import Service
from daemon.api.succession import Succession
from daemon.config import ConfigError
from daemon.ipc import child, doorbell
from daemon.ipc.child import CUT_SIGNAL, EXIT_CONFIG, EXIT_HANDOVER, HANDOVER_SIGNAL, STOP_SIGNAL, ChildSpec
from daemon.ipc.fabric import Fabric
from daemon.ipc.kept_sockets import KeptSockets
from daemon.ipc.keys_page import KeysReader
from daemon.ipc.messages import EngineState
from daemon.ipc.metrics_page import ENGINE, FRONTEND, snapshot
from daemon.ipc.model_text import CHANGED, text_digest
from daemon.ipc.outbox import Outbox
from daemon.ipc.process_table import Progress
from daemon.models.model_config import ModelConfig, ModelError, read_model_config
from daemon.models.text_files import TextFiles, load_text_files

log = logging.getLogger(__name__)

_HEARTBEAT = 1.0  # seconds between two heartbeats
_HANDOVER_WAIT, _HANDOVER_POLL = 3.0, 0.005  # seconds for requests that have just arrived to be journaled
_LATE = 0.5  # seconds by which a heartbeat may be late without a reason to distrust this process's own clock
_HEARTBEAT_DEADLINE = 5.0  # seconds after a heartbeat at which the next one is overdue
_LOADING_DEADLINE = 30.0  # seconds to load and to take over the responses of a former process


def prepare(spec: ChildSpec) -> None:
    """Load, in a standby, what `main` needs of the model. Exits if that cannot be loaded."""
    keep_large_blocks_apart()
    try:
        _model_files(spec)
    except ModelError as e:
        log.error("%s", e)
        sys.exit(EXIT_CONFIG)
    _settle()


class _ModelFiles(NamedTuple):
    text: TextFiles
    config: ModelConfig


def _model_files(spec: ChildSpec) -> _ModelFiles:
    """Load what a frontend needs of the model, once in a process. Raises ModelError."""
    return _load_model_files(spec.model_dir, spec.config.main_name, spec.model_text)


@functools.lru_cache(maxsize=1)
def _load_model_files(model_dir: str, name: str, digest: str) -> _ModelFiles:
    path = Path(model_dir)
    files = _ModelFiles(load_text_files(path), read_model_config(path, name))
    if digest and digest != text_digest(model_dir):
        raise ModelError(CHANGED.format(model_dir))
    return files


def main(spec: ChildSpec) -> None:
    """Run the frontend process."""
    keep_large_blocks_apart()
    fabric = child.initialize(spec)
    fabric.progress(fabric.process).enter(EngineState.LOADING, fabric.incarnation, _LOADING_DEADLINE)
    try:
        uvloop.run(_serve(spec, fabric))
    except (ConfigError, ModelError) as e:  # the files were good when the daemon started; a restart would not help
        log.error("%s", e)
        sys.exit(EXIT_CONFIG)


async def _serve(spec: ChildSpec, fabric: Fabric) -> None:
    loop = asyncio.get_running_loop()
    tracker = RequestTracker(fabric, spec.config, adopt=spec.adopt)
    kept = KeptSockets(spec.keeper_fd, spec.incarnation, spec.keeper_capacity)
    _, index = fabric.topology.role(fabric.process)
    outbox = Outbox(fabric.outbox(index), adopt=spec.adopt)
    others = OtherFrontends(fabric, tracker.metrics) if fabric.topology.frontends > 1 else None
    service, app = _application(spec, fabric, tracker, outbox, others)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None
    connections = Connections(runner.server, spec.config, tracker.metrics, kept)

    def on_bell() -> None:
        doorbell.clear(fabric.bell)
        tracker.on_doorbell()

    loop.add_reader(fabric.bell, on_bell)
    stop, cut = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(STOP_SIGNAL, stop.set)
    loop.add_signal_handler(CUT_SIGNAL, cut.set)
    loop.add_signal_handler(HANDOVER_SIGNAL, os._exit, EXIT_HANDOVER)
    succession = Succession(service, tracker, outbox, kept, connections)
    await succession.start()
    listener = socket.socket(fileno=spec.listener_fd)
    listener.setblocking(False)
    acceptor = ConnectionAcceptor(listener, connections, others)
    acceptor.start()
    handing_over = asyncio.Event()
    loop.add_signal_handler(HANDOVER_SIGNAL, handing_over.set)
    _settle()
    progress = fabric.progress(fabric.process)
    progress.enter(EngineState.SERVING, fabric.incarnation, _HEARTBEAT_DEADLINE)
    tasks = [
        asyncio.create_task(_send_heartbeats(progress, tracker, spec.config.hang_timeout)),
        asyncio.create_task(connections.sweep()),
        asyncio.create_task(_hand_over(handing_over, acceptor, connections)),
    ]
    await stop.wait()
    tracker.draining = True
    progress.enter(EngineState.DRAINING, fabric.incarnation, _HEARTBEAT_DEADLINE)
    # Accept connections while requests run: a 503 is a better answer than a connection reset at the end.
    await _drain(tracker, spec.config.drain_timeout, cut)
    acceptor.stop()
    service.kept.close()
    for task in tasks:
        task.cancel()
    await succession.close()
    await runner.cleanup()


def _settle() -> None:
    """Take what is loaded now out of garbage collection: a full collection would stop all requests to visit it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _application(
    spec: ChildSpec, fabric: Fabric, tracker: RequestTracker, outbox: Outbox, others: OtherFrontends | None
) -> tuple[Service, web.Application]:
    config = spec.config
    (tokenizer, chat_template), model_config = _model_files(spec)
    keys = SharedKeys(KeysReader(fabric.keys_page())) if config.api_key_file else None
    _, index = fabric.topology.role(fabric.process)
    service = Service(
        config=config,
        generator=tracker,
        tokenizer=tokenizer,
        chat_template=chat_template,
        model_config=model_config,
        metrics=FrontendMetrics(tracker.metrics, lambda: _read_all(fabric, tracker)),
        origins=OriginPolicy(config, keys=keys is not None),
        guard=ResponseGuard(outbox, tracker.metrics),
        others=others,
        frontend=index,
    )
    service.kept = KeptStreams(service, outbox)
    tracker.store.make_room = service.kept.make_room
    return service, build_app(service, keys)


def _read_all(fabric: Fabric, tracker: RequestTracker) -> DaemonSnapshot:
    """Read the metrics of all processes: any frontend can answer `/metrics` for the whole daemon."""
    topology = fabric.topology
    frontends = [fabric.metrics(topology.frontend(k)) for k in range(topology.frontends)]
    engines = [fabric.metrics(topology.engine(i)) for i in range(topology.engines)]
    return DaemonSnapshot(
        [snapshot(page, FRONTEND) for page in frontends],
        [snapshot(page, ENGINE) for page in engines],
        tracker.engines.facts(),
        tracker.engines.states(),
    )


async def _hand_over(ordered: asyncio.Event, acceptor: ConnectionAcceptor, connections: Connections) -> None:
    """End the process for its successor once this is ordered.

    What the successor needs is in shared memory at any moment. So only requests that have just arrived are waited
    for, until they are there too; new connections wait in the listener.
    """
    await ordered.wait()
    acceptor.stop()
    loop = asyncio.get_running_loop()
    end = loop.time() + _HANDOVER_WAIT
    await asyncio.sleep(_HANDOVER_POLL)  # until what is accepted is a connection
    while not connections.let_go() and loop.time() < end:
        await asyncio.sleep(_HANDOVER_POLL)
    os._exit(EXIT_HANDOVER)


async def _send_heartbeats(progress: Progress, tracker: RequestTracker, hang_timeout: float) -> None:
    """Show for ever that this process lives, and look for engines that hang.

    After this process was stopped itself, the engines may have been, too: they get as long again for their steps.
    """
    loop = asyncio.get_running_loop()
    trusted_from = 0.0
    while True:
        progress.beat(_HEARTBEAT_DEADLINE)
        due = loop.time() + _HEARTBEAT
        await asyncio.sleep(_HEARTBEAT)
        late = loop.time() - due
        if late >= _LATE:
            trusted_from = loop.time() + min(late, hang_timeout)
        if loop.time() >= trusted_from:
            tracker.check_engines()


async def _drain(tracker: RequestTracker, timeout: float, cut: asyncio.Event) -> None:
    """Wait for running requests; end those that still run after `timeout` seconds, or once `cut` is set."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while tracker.active and loop.time() < start + timeout and not cut.is_set():
        await asyncio.sleep(0.02)
    if tracker.active:
        waited = loop.time() - start
        log.warning("%d requests were still running after %.0f s and are cut off", tracker.active, waited)
        tracker.give_up()


class ConnectionAcceptor:
    """Accepts one connection in each iteration of the event loop.

    asyncio's own server empties the whole backlog in one iteration, so the first frontend that wakes up would get
    every connection of a burst. With one at a time a busy frontend accepts slowly, and its siblings accept the rest.
    """

    def __init__(
        self, listener: socket.socket, connections: Connections, others: OtherFrontends | None = None
    ) -> None:
        """`others`: they may pass on connections; None: there are none."""
        self._others = others
        self._listener = listener
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()
        self._log = RateLimitedLog(log, logging.ERROR)

    def start(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
        if self._others is not None:
            self._others.start(self._connections)

    def stop(self) -> None:
        self._loop.remove_reader(self._listener)
        if self._others is not None:
            self._others.stop()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another frontend accepted it, or the client hung up
        except OSError as e:  # out of file descriptors, by this process or by the whole machine
            self._log.write("cannot accept a connection: %s", e)
            self.stop()
            self._loop.call_later(0.05 if self._connections.close_idle() else 1.0, self.start)
            return
        connection.setblocking(False)
        if (task := self._connections.accept(connection)) is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
