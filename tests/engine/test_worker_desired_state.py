"""An engine applies its desired state, including the one that is set before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from daemon.control.policy.freeness import policy_of
from daemon.engine.fake.hash import expected_stream
from daemon.engine.grammar.grammars import Grammars
from daemon.engine.identity import Identity
from daemon.engine.startup import LoadedEngine
from daemon.engine.worker import Worker
from daemon.ipc.desired_state import DesiredStateWriter
from daemon.ipc.fabric import COORDINATOR, Fabric
from daemon.ipc.messages import EngineState, encode
from daemon.kvpool.link import KvLink
from daemon.kvpool.pool_directory import PeerPools
from daemon.kvpool.transport import Completion, Transport
from daemon.models.grammar.vocabulary import Vocabulary
from tests.engine.loopback import ENGINE_INCARNATION, NUM_BLOCKS, VOCAB, Loopback


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    made = Loopback()
    yield made
    made.close()


class NoPeers:
    """The pools and the transport of an engine without peers."""

    states = b""

    def refresh(self) -> None:
        pass

    def completed(self) -> list[Completion]:
        return []


def no_grammars() -> Grammars:
    def load() -> Vocabulary:
        raise AssertionError("no request here has a grammar")

    return Grammars(load, wake=lambda: None)


def make_worker(loopback: Loopback, incarnation: int = ENGINE_INCARNATION) -> Worker:
    """Return the worker of engine 0."""
    fabric = Fabric(loopback.handles, loopback.engine_process, incarnation)
    kv = KvLink(NUM_BLOCKS, cast(PeerPools, NoPeers()), cast(Transport, NoPeers()))
    engine = LoadedEngine(loopback.runner, loopback.scheduler, kv, Identity(1, 1), no_grammars(), [])
    return Worker(fabric, engine, policy_of("llumd"), overlap=False)


def coordinator_writer(loopback: Loopback) -> DesiredStateWriter:
    return DesiredStateWriter(Fabric(loopback.handles, COORDINATOR, 1).desired_states())


def test_an_engine_follows_its_desired_state(loopback: Loopback):
    desired_states, worker = coordinator_writer(loopback), make_worker(loopback)
    progress = Fabric(loopback.handles, loopback.engine_process, ENGINE_INCARNATION).progress(loopback.engine_process)
    worker.apply_desired_state()  # SERVING if no state was ever written
    assert (worker.state, progress.state) == (EngineState.SERVING, EngineState.SERVING)
    assert worker.llumlet.accepting
    for state in (EngineState.DRAINING, EngineState.PARKED, EngineState.SERVING):
        desired_states.put(0, state)
        worker.apply_desired_state()
        assert (worker.state, progress.state) == (state, state)
        assert progress.incarnation == ENGINE_INCARNATION
        assert worker.llumlet.accepting == (state == EngineState.SERVING)


def test_a_successor_begins_in_the_state_desired_of_its_predecessor(loopback: Loopback):
    coordinator_writer(loopback).put(0, EngineState.DRAINING)
    worker = make_worker(loopback, ENGINE_INCARNATION + 1)
    worker.apply_desired_state()
    assert worker.state == EngineState.DRAINING
    assert not worker.llumlet.accepting


def test_a_parked_engine_ends_once_its_requests_are_served(loopback: Loopback):
    start = loopback.journal_request([1, 2, 3], max_tokens=20)
    assert loopback.commands.put(encode(start), ENGINE_INCARNATION)
    coordinator_writer(loopback).put(0, EngineState.PARKED)
    make_worker(loopback).run()
    assert loopback.receive_streams() == {start.rid: expected_stream([1, 2, 3], 3, 20, VOCAB)}
