"""The coordinator process: pairs engines for migration, wakes and parks them, and answers the admin socket.

No request waits for it. When it is dead, serving goes on; rebalancing and scaling pause until its successor runs.
"""

from __future__ import annotations

import asyncio
import socket
import time

from aiohttp import web

from daemon.control.admin import build_admin
from daemon.control.autoscaler import Autoscaler
from daemon.control.desired_states import DesiredStates
from daemon.control.key_order import KeyOrder
from daemon.control.rebalancer import Rebalancer
from daemon.control.request_orders import RequestOrders
from daemon.control.restart_order import RestartOrder
from daemon.control.status import StatusReader
from daemon.ipc import child, doorbell
from daemon.ipc.child import STOP_SIGNAL, ChildSpec
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineState

_BEAT_DEADLINE = 30.0  # seconds


def main(spec: ChildSpec) -> None:
    """Run the coordinator process until it gets STOP_SIGNAL."""
    fabric = child.initialize(spec)
    asyncio.run(_serve(spec, fabric))


async def _serve(spec: ChildSpec, fabric: Fabric) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(STOP_SIGNAL, stop.set)
    loop.add_reader(fabric.bell, lambda: doorbell.clear(fabric.bell))
    events = EventWriter(fabric.events(fabric.process))
    status, rebalancer = StatusReader(fabric, spec), Rebalancer(fabric, spec.config, events)
    desired_states = DesiredStates(fabric, events)
    autoscaler = Autoscaler(desired_states, spec.config, fabric.topology.engines)
    orders, key_order = RequestOrders(fabric, status), KeyOrder(fabric)
    restart_order = RestartOrder(fabric, spec)
    app = build_admin(status, orders, rebalancer, desired_states, key_order, restart_order, events)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, socket.socket(fileno=spec.listener_fd)).start()
    progress = fabric.progress(fabric.process)
    progress.enter(EngineState.SERVING, fabric.incarnation, _BEAT_DEADLINE)
    while not stop.is_set():
        progress.beat(_BEAT_DEADLINE)
        facts = status.facts()
        rebalancer.cycle(facts)
        if autoscaler.enabled:
            autoscaler.cycle(facts, status.projected(facts), time.monotonic())
        try:
            await asyncio.wait_for(stop.wait(), spec.config.rebalance_period)
        except TimeoutError:
            continue
    await runner.cleanup()
