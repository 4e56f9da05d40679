"""Cost of the control plane: dispatch, board, ring, as a table and as JSON.

    python -m bench.control [--json FILE]

Dispatch is timed from a parsed request (token ids in hand) to its `Start` committed on the engine's ring:
boards of 8 engines and 2 frontends read, engine chosen, 1,000-token prompt journaled. No process waits for the
doorbell (an eventfd) here; to wake a process costs a kernel wake-up more. Two cases: the frontend has read the boards
when the engines' last steps woke it (the usual case), or all engines have published since (the worst case).
The cases take turns: few and many requests an engine, with and without prefix_affinity, each with its own fabric.
If Ray is installed, its actor makes the same choice.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import random
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import actor
from bench.machine import describe
from daemon.api.generator import RequestAttributes
from daemon.api.request_state import RequestState
from daemon.api.request_tracker import RequestTracker
from daemon.config import Config
from daemon.control.rebalancer import Rebalancer
from daemon.control.status import StatusReader
from daemon.ipc import doorbell, segment
from daemon.ipc.board import BoardReader, BoardWriter
from daemon.ipc.child import ChildSpec
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles, Topology
from daemon.ipc.messages import (
    Demand,
    EngineFacts,
    EngineState,
    SamplingParams,
    StepOutput,
    decode_engine_facts,
    decode_to_frontend,
    encode,
)
from daemon.ipc.process_table import ProcessFacts, ProcessState
from daemon.ipc.ring import RingReader, RingWriter, ring_bytes

ENGINES, FRONTENDS, PROMPT = 8, 2, 1000
_WARM_UP = 200  # round trips
BY_ACTOR = "choice by a Ray actor, round trip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--rounds", type=int, default=5000, help="dispatches and round trips measured (default 5000)")
    args = parser.parse_args()
    rows = asyncio.run(measure_dispatch(args.rounds))
    rows |= {
        "board read": measure_board(args.rounds),
        "coordinator cycle, 64 engines": measure_cycle(min(300, args.rounds)),
    }
    rows |= measure_round_trips(args.rounds)
    boards = [encode(facts(1, 100 * i, [])) for i in range(ENGINES)]
    by_actor = actor.measure(boards, args.rounds)
    if by_actor:
        rows[BY_ACTOR] = summary(by_actor)
    _print(rows)
    if not by_actor:
        print(f"{BY_ACTOR:42}  ray: not installed")
    if args.json:
        record = {"command": "python -m bench.control", "machine": describe(), "microseconds": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


# -- dispatch -------------------------------------------------------------------------------------


class SimulatedEngines:
    """Engines without processes: they publish facts and empty their rings."""

    def __init__(self, handles: FabricHandles, running: int) -> None:
        self._running = running
        self._fabrics = [Fabric(handles, handles.topology.engine(i), 1) for i in range(ENGINES)]
        self._boards = [f.board() for f in self._fabrics]
        self._rings = [f.reader(handles.topology.frontend(0)) for f in self._fabrics]
        self._consumed = [[0, 0] for _ in range(ENGINES)]
        self._step = 0

    def publish(self) -> None:
        """Publish new facts on every board."""
        self._step += 1
        for i, board in enumerate(self._boards):
            consumed = [Demand(1, *self._consumed[i]), Demand(1, 0, 0)]
            board.publish(encode(facts(self._step, random.randrange(100, 4000), consumed, self._running)))

    def consume(self) -> None:
        """Read all Starts from every ring."""
        for i, ring in enumerate(self._rings):
            while ring.read() is not None:
                self._consumed[i][0] += 1
                self._consumed[i][1] += PROMPT
            ring.ack()


def facts(step: int, used: int, consumed: list[Demand], running: int = 64) -> EngineFacts:
    """Return the facts of a busy engine."""
    return EngineFacts(
        incarnation=1,
        state=EngineState.SERVING,
        step=step,
        time=time.monotonic(),
        block_size=16,
        total_blocks=50_000,
        used_blocks=used,
        running=running,
        waiting=3,
        head_demand_blocks=40,
        pending_prefill_tokens=900,
        waiting_tokens=2000,
        max_num_seqs=1024,
        max_model_len=8192,
        step_seconds=0.02,
        tokens_per_second=3000.0,
        consumed=consumed,
    )


class _TimedFabric(Fabric):
    """Stores the time of its last bell, when a Start is committed. The request does not wait for what follows."""

    rang_at = 0  # nanoseconds

    def ring_bell(self, process: int) -> None:
        super().ring_bell(process)
        self.rang_at = time.perf_counter_ns()


class Dispatching:
    """A frontend with `running` unfinished requests that dispatches to engines with `running` requests each."""

    def __init__(self, running: int, *, affinity: bool = True) -> None:
        handles = Fabric.create(Topology(FRONTENDS, ENGINES), 64 << 20, 1 << 20)
        table = Fabric(handles, -1, 0).table_writer()
        for process in range(handles.topology.processes):
            table.publish(process, ProcessFacts(state=ProcessState.UP, incarnation=1))
        self._engines = SimulatedEngines(handles, running)
        self._engines.publish()
        config = Config(max_queued=10_000, prefix_affinity=affinity)
        self._fabric = _TimedFabric(handles, handles.topology.frontend(0), 1)
        self._tracker = RequestTracker(self._fabric, config)
        self._sibling = RequestTracker(Fabric(handles, handles.topology.frontend(1), 1), Config())
        self._prompt = [random.randrange(50_000) for _ in range(PROMPT)]
        self._params = SamplingParams(max_tokens=256, seed=1)
        self._unfinished = [self._submit() for _ in range(running)]

    def _submit(self) -> RequestState:
        request = self._tracker.submit(self._prompt, self._params, RequestAttributes("chatcmpl-0"))
        self._engines.consume()
        return request

    def once(self, woken: bool) -> float:
        """Return the microseconds from token ids to a committed Start and its engine's doorbell.

        `woken`: the frontend has read the boards before.
        """
        self._engines.publish()
        if woken:
            self._tracker.on_doorbell()
        start = time.perf_counter_ns()
        request = self._tracker.submit(self._prompt, self._params, RequestAttributes("chatcmpl-0"))
        end = self._fabric.rang_at
        if random.random() < 0.3:
            self._sibling.submit(self._prompt[:8], self._params, RequestAttributes("s")).release()
        request.release()
        self._engines.consume()
        return (end - start) / 1e3


async def measure_dispatch(rounds: int) -> dict[str, dict[str, float]]:
    """Return the microseconds from token ids to a committed Start."""
    usual, plain = Dispatching(64), Dispatching(64, affinity=False)
    cases = {
        "dispatch": (usual, True),
        "dispatch, every board changed since": (usual, False),
        "dispatch, 10 requests an engine": (Dispatching(10), True),
        "dispatch, 1000 requests an engine": (Dispatching(1000), True),
        "dispatch, without prefix affinity": (plain, True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    for i in range(300 + rounds):
        for name, (frontend, woken) in cases.items():
            took = frontend.once(woken)
            if i >= 300:
                times[name].append(took)
    gc.enable()
    return {name: summary(found) for name, found in times.items()}


def measure_board(rounds: int) -> dict[str, float]:
    """Return the microseconds to read and decode one changed board."""
    view = segment.attach(segment.create(4096))
    writer, reader = BoardWriter(view), BoardReader(view)
    published = encode(facts(1, 100, [Demand(1, 5, 500)] * FRONTENDS))
    times = []
    for _ in range(rounds):
        writer.publish(published)
        start = time.perf_counter_ns()
        found = reader.read()
        assert found is not None
        decode_engine_facts(found[1])
        times.append((time.perf_counter_ns() - start) / 1e3)
    return summary(times)


def measure_cycle(rounds: int) -> dict[str, float]:
    """Return the microseconds of one coordinator period over 64 engines: read boards, pair engines, write orders."""
    engines = 64
    topology = Topology(1, engines)
    handles = Fabric.create(topology, 1 << 20, 1 << 20)
    table = Fabric(handles, -1, 0).table_writer()
    for process in range(topology.processes):
        table.publish(process, ProcessFacts(state=ProcessState.UP, incarnation=1))
    config = Config(devices=["cpu"] * engines)
    birth = ChildSpec(config, handles, COORDINATOR, 1, os.getpid(), "")
    fabric = Fabric(handles, COORDINATOR, 1)
    status = StatusReader(fabric, birth)
    rebalancer = Rebalancer(fabric, config, EventWriter(fabric.events(COORDINATOR)))
    boards = [Fabric(handles, topology.engine(i), 1).board() for i in range(engines)]
    rings = [Fabric(handles, topology.engine(i), 1).reader(COORDINATOR) for i in range(engines)]
    times = []
    for step in range(rounds):
        for board in boards:
            board.publish(encode(facts(step, random.randrange(100, 50_000), [Demand(1, 0, 0)])))
        start = time.perf_counter_ns()
        rebalancer.cycle(status.facts())
        times.append((time.perf_counter_ns() - start) / 1e3)
        for ring in rings:
            while ring.read() is not None:
                pass
            ring.ack()
    return summary(times)


# -- round trips ------------------------------------------------------------------------------------

_MESSAGE = StepOutput([1], [1], [7], [1], [1234], [0], [0])


def measure_round_trips(rounds: int) -> dict[str, dict[str, float]]:
    """Return half the round trip of a small step message between two processes that wait blocked between messages."""
    return {
        "ring + doorbell, half round trip": _ring_trip(rounds),
        "unix socket, half round trip": _socket_trip(rounds),
        "multiprocessing.Queue, half round trip": _queue_trip(rounds),
    }


def _ring_trip(rounds: int) -> dict[str, float]:
    capacity = 64 << 10
    views = [segment.attach(segment.create(ring_bytes(capacity))) for _ in range(2)]
    bells = [doorbell.create() for _ in range(2)]

    def end(me: int) -> tuple[Callable[[], None], Callable[[], None]]:
        writer, reader = RingWriter(views[me], 1), RingReader(views[1 - me])

        def send() -> None:
            writer.put(encode(_MESSAGE), 1)
            doorbell.ring(bells[1 - me])

        def receive() -> None:
            while (record := reader.read()) is None:
                doorbell.wait(bells[me], 5)
            decode_to_frontend(record.payload)
            reader.ack()

        return send, receive

    return _ping_pong(lambda: end(0), lambda: end(1), rounds)


def _socket_trip(rounds: int) -> dict[str, float]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def end(me: int) -> tuple[Callable[[], None], Callable[[], None]]:
        sock = pair[me]
        return lambda: sock.sendall(encode(_MESSAGE)), lambda: decode_to_frontend(sock.recv(4096)) and None

    return _ping_pong(lambda: end(0), lambda: end(1), rounds)


def _queue_trip(rounds: int) -> dict[str, float]:
    context = multiprocessing.get_context("fork")
    queues: list[Any] = [context.Queue(), context.Queue()]

    def end(me: int) -> tuple[Callable[[], None], Callable[[], None]]:
        return lambda: queues[1 - me].put(_MESSAGE), lambda: queues[me].get() and None

    return _ping_pong(lambda: end(0), lambda: end(1), rounds)


End = Callable[[], tuple[Callable[[], None], Callable[[], None]]]


def _ping_pong(here: End, there: End, rounds: int) -> dict[str, float]:
    pid = os.fork()
    if pid == 0:
        send, receive = there()
        for _ in range(_WARM_UP + rounds):
            receive()
            send()
        time.sleep(0.5)  # a Queue sends from its own thread: let it send the last message
        os._exit(0)
    send, receive = here()
    times = []
    for i in range(_WARM_UP + rounds):
        start = time.perf_counter_ns()
        send()
        receive()
        if i >= _WARM_UP:
            times.append((time.perf_counter_ns() - start) / 2e3)
    os.waitpid(pid, 0)
    return summary(times)


# -- report -----------------------------------------------------------------------------------------


def summary(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=1000)
    return {"p50": round(cuts[499], 2), "p90": round(cuts[899], 2), "p99": round(cuts[989], 2), "min": min(times)}


def _print(rows: dict[str, dict[str, float]]) -> None:
    print(f"{'microseconds':42}{'p50':>9}{'p90':>9}{'p99':>9}{'min':>9}")
    for name, row in rows.items():
        print(f"{name:42}" + "".join(f"{row[k]:9.2f}" for k in ("p50", "p90", "p99", "min")))


if __name__ == "__main__":
    main()
