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
from daemon.control.autoscaler import Scaler
from daemon.control.rebalancer import Balancer
from daemon.control.status import Overview
from daemon.ipc import child, doorbell
from daemon.ipc.child import LEAVE, Birth
from daemon.ipc.events import Ordered
from daemon.ipc.layout import Fabric
from daemon.ipc.messages import EngineState

log = logging.getLogger(__name__)

_BEAT_DEADLINE = 30.0


def main(birth: Birth) -> None:
    """Entry point of the coordinator process."""
    fabric = child.begin(birth)
    asyncio.run(_serve(birth, fabric))


async def _serve(birth: Birth, fabric: Fabric) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(LEAVE, stop.set)
    loop.add_reader(fabric.bell, lambda: doorbell.answer(fabric.bell))
    overview, balancer = Overview(fabric, birth), Balancer(fabric, birth.config)

    def scale(engine: int, state: EngineState) -> None:
        verb = "park" if state == EngineState.PARKED else "wake"
        balancer.log.write(Ordered(verb, "", engine, "", "auto-scaling"))
        balancer.wish(engine, state)

    scaler = Scaler(balancer.wishes, scale, birth.config, fabric.topology.engines)
    runner = web.AppRunner(build_admin(overview, balancer), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, socket.socket(fileno=birth.listener)).start()
    progress = fabric.progress(fabric.process)
    progress.enter(EngineState.SERVING, fabric.incarnation, _BEAT_DEADLINE)
    while not stop.is_set():
        progress.beat(_BEAT_DEADLINE)
        facts = overview.facts()
        balancer.cycle(facts)
        if scaler.on:
            scaler.cycle(facts, overview.outlook(facts), time.monotonic())
        try:
            await asyncio.wait_for(stop.wait(), birth.config.rebalance_period)
        except TimeoutError:
            continue
    await runner.cleanup()
