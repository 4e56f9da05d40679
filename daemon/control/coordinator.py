"""The coordinator process: pairs engines for migration, wakes and parks them, and answers the admin socket.

No request waits on it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from aiohttp import web

from daemon.control.admin import build_admin
from daemon.control.autoscaler import Autoscaler
from daemon.control.rebalancer import Rebalancer
from daemon.control.status import Overview
from daemon.ipc import child, doorbell
from daemon.ipc.child import STOP_SIGNAL, ChildSpec
from daemon.ipc.events import Ordered
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineState

log = logging.getLogger(__name__)

_BEAT_DEADLINE = 30.0


def main(spec: ChildSpec) -> None:
    """Entry point of the coordinator process."""
    fabric = child.begin(spec)
    asyncio.run(_serve(spec, fabric))


async def _serve(spec: ChildSpec, fabric: Fabric) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(STOP_SIGNAL, stop.set)
    loop.add_reader(fabric.bell, lambda: doorbell.answer(fabric.bell))
    overview, rebalancer = Overview(fabric, spec), Rebalancer(fabric, spec.config)

    def scale(engine: int, state: EngineState) -> None:
        verb = "park" if state == EngineState.PARKED else "wake"
        rebalancer.log.write(Ordered(verb, "", engine, "", "auto-scaling"))
        rebalancer.set_desired_state(engine, state)

    autoscaler = Autoscaler(rebalancer.desired_states, scale, spec.config, fabric.topology.engines)
    runner = web.AppRunner(build_admin(overview, rebalancer), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, socket.socket(fileno=spec.listener)).start()
    progress = fabric.progress(fabric.process)
    progress.enter(EngineState.SERVING, fabric.incarnation, _BEAT_DEADLINE)
    while not stop.is_set():
        progress.beat(_BEAT_DEADLINE)
        facts = overview.facts()
        rebalancer.cycle(facts)
        if autoscaler.on:
            autoscaler.cycle(facts, overview.outlook(facts), time.monotonic())
        try:
            await asyncio.wait_for(stop.wait(), spec.config.rebalance_period)
        except TimeoutError:
            continue
    await runner.cleanup()
