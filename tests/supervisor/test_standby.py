"""When a standby is started, what it gets as its role, and what happens when it dies."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from daemon.config import Config
from daemon.ipc.child import EXIT_CONFIG, ChildSpec
from daemon.ipc.fabric import FabricHandles, Topology
from daemon.supervisor.standby import CALM, Standby, Started, wait_for_role

SPEC = ChildSpec(Config(), FabricHandles(Topology(2, 1), 3, (), (), ()), 1, 0, 10, "model")


class Starter:
    """Stands in for the start of a process; it keeps the process's end of the socket."""

    def __init__(self) -> None:
        self.roles: list[int] = []
        self.code = -9
        self.error: OSError | None = None

    def __call__(self, role_fd: int) -> Started:
        if self.error is not None:
            raise self.error
        self.roles.append(os.dup(role_fd))
        handle = SimpleNamespace(join=lambda: None, close=lambda: None, exitcode=self.code)
        return Started(handle, os.open(os.devnull, os.O_RDONLY))


@pytest.fixture
def starter() -> Starter:
    return Starter()


def ready(starter: Starter) -> Standby:
    standby = Standby(starter)
    standby.tick(0.0, calm=True)
    standby.tick(CALM, calm=True)
    assert starter.roles
    return standby


def test_it_starts_once_every_frontend_has_served_for_a_while(starter: Starter) -> None:
    standby = Standby(starter)
    for now, calm in ((0.0, False), (10.0, True), (10.0 + CALM - 0.1, True), (10.0 + CALM, False), (20.0, True)):
        standby.tick(now, calm=calm)
        assert not starter.roles
    for now in (20.0 + CALM, 30.0, 40.0):
        standby.tick(now, calm=True)
    assert len(starter.roles) == 1


@pytest.mark.parametrize("adopt", [True, False])
def test_it_gets_its_role_with_the_channel(starter: Starter, adopt: bool) -> None:
    standby = ready(starter)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        role = dataclasses.replace(SPEC, process=2, incarnation=7, keeper_fd=theirs.fileno(), adopt=adopt)
        assert standby.take(role) is not None
        assert standby.pidfd == -1
        got = wait_for_role(SPEC, starter.roles[0])
        assert (got.process, got.incarnation, got.adopt, got.model_dir) == (2, 7, adopt, "model")
        with socket.socket(fileno=got.keeper_fd) as channel:
            channel.send(b"here")
            assert ours.recv(10) == b"here"
    assert standby.take(SPEC) is None  # there is no second one yet


def test_it_says_when_it_is_loaded(starter: Starter) -> None:
    standby = ready(starter)
    assert not standby.loaded
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_role, SPEC, starter.roles[0])
        while not standby.loaded:
            time.sleep(0.001)
        with socket.socket() as channel:
            standby.take(dataclasses.replace(SPEC, incarnation=3, keeper_fd=channel.fileno()))
        got = waiting.result()
    os.close(got.keeper_fd)
    assert got.incarnation == 3
    assert not standby.loaded


@pytest.mark.parametrize("before", [True, False])
def test_its_message_need_not_be_read(starter: Starter, before: bool) -> None:
    """The kernel reports the reset of the socket once, before the role that is in it."""
    standby = ready(starter)
    with ThreadPoolExecutor(1) as pool, socket.socket() as channel:
        role = dataclasses.replace(SPEC, incarnation=3, keeper_fd=channel.fileno())
        if before:
            with socket.socket(fileno=os.dup(starter.roles[0])) as theirs:
                theirs.send(b"L")
            standby.take(role)
        waiting = pool.submit(wait_for_role, SPEC, starter.roles[0])
        if not before:
            time.sleep(0.2)
            standby.take(role)
        got = waiting.result()
    os.close(got.keeper_fd)
    assert got.incarnation == 3


def test_it_ends_when_the_supervisor_drops_it(starter: Starter) -> None:
    standby = ready(starter)
    standby._forget()
    with pytest.raises(SystemExit):
        wait_for_role(SPEC, starter.roles[0])


def test_one_that_has_just_died_takes_no_role(starter: Starter) -> None:
    standby = ready(starter)
    os.close(starter.roles[0])
    with socket.socket() as channel:
        assert standby.take(dataclasses.replace(SPEC, keeper_fd=channel.fileno())) is None
    standby.reap(50.0)
    standby.tick(50.5, calm=True)
    assert len(starter.roles) == 1
    standby.tick(51.0, calm=True)
    assert len(starter.roles) == 2


def test_a_standby_that_can_never_run_is_not_tried_again(starter: Starter, caplog: pytest.LogCaptureFixture) -> None:
    starter.code = EXIT_CONFIG
    standby = ready(starter)
    standby.reap(50.0)
    standby.tick(1e9, calm=True)
    assert len(starter.roles) == 1
    assert "no other is started" in caplog.text


def test_a_start_that_fails_is_tried_again_later(starter: Starter, caplog: pytest.LogCaptureFixture) -> None:
    starter.error = OSError(12, "Cannot allocate memory")
    standby = Standby(starter)
    for now in (0.0, CALM, CALM + 0.5):
        standby.tick(now, calm=True)
    assert caplog.text.count("cannot start a standby frontend") == 1
    starter.error = None
    standby.tick(CALM + 1.0, calm=True)
    assert len(starter.roles) == 1
