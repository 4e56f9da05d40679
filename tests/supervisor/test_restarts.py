"""When a child starts again, and whether a frontend adopts: pure rules."""

from __future__ import annotations

import pytest

from daemon.supervisor.restarts import (
    FAILED_ADOPTIONS,
    FIRST_BACKOFF,
    HEALTHY_AFTER,
    HEALTHY_BEATS,
    KILLED_ADOPTIONS,
    MAX_BACKOFF,
    MAX_KILLED_BACKOFF,
    WORKED_BEATS,
    Backoff,
    Death,
    Succession,
)

CRASH = Death(uptime=1.0, beats=0, killed=False)
KILL = Death(uptime=1.0, beats=0, killed=True)
HEALTHY = Death(uptime=HEALTHY_AFTER + 1, beats=HEALTHY_BEATS, killed=False)


def test_an_engine_waits_before_each_restart() -> None:
    backoff = Backoff(frontend=False)
    assert [backoff.after(CRASH) for _ in range(4)] == [FIRST_BACKOFF * 2**i for i in range(4)]
    for _ in range(10):
        backoff.after(CRASH)
    assert backoff.after(KILL) == MAX_BACKOFF
    assert backoff.after(HEALTHY) == FIRST_BACKOFF


def test_the_first_restart_of_a_frontend_is_immediate() -> None:
    backoff = Backoff(frontend=True)
    assert [backoff.after(CRASH) for _ in range(3)] == [0.0, FIRST_BACKOFF, 2 * FIRST_BACKOFF]
    assert backoff.after(HEALTHY) == 0.0
    delays = [backoff.after(KILL) for _ in range(20)]
    assert max(delays) == MAX_KILLED_BACKOFF
    assert backoff.after(CRASH) == MAX_BACKOFF
    assert backoff.after(KILL._replace(beats=WORKED_BEATS)) == 0.0
    assert backoff.after(CRASH._replace(beats=WORKED_BEATS)) == FIRST_BACKOFF


def test_a_frontend_that_hung_is_not_healthy_for_its_uptime() -> None:
    backoff = Backoff(frontend=True)
    assert backoff.after(CRASH) == 0.0
    assert backoff.after(Death(uptime=1000.0, beats=HEALTHY_BEATS - 1, killed=False)) == FIRST_BACKOFF


def test_only_successors_adopt() -> None:
    succession = Succession()
    assert not succession.adopts
    succession.on_death(CRASH)
    assert succession.adopts


@pytest.mark.parametrize(("death", "limit"), [(CRASH, FAILED_ADOPTIONS), (KILL, KILLED_ADOPTIONS)])
def test_responses_that_kill_each_successor_are_given_up(death: Death, limit: int) -> None:
    succession = Succession()
    succession.on_death(HEALTHY)
    adopted = [succession.adopts]
    for _ in range(limit):
        succession.on_death(death)
        adopted.append(succession.adopts)
    assert adopted == [True] * limit + [False]
    succession.on_death(CRASH)  # of the one that had adopted nothing: its own responses go on
    assert succession.adopts


def test_kills_of_frontends_that_have_served_never_end_succession() -> None:
    succession = Succession()
    succession.on_death(HEALTHY)
    for _ in range(10 * KILLED_ADOPTIONS):
        succession.on_death(KILL._replace(beats=WORKED_BEATS))
        assert succession.adopts


def test_a_healthy_successor_and_a_handover_clear_the_record() -> None:
    succession = Succession()
    for _ in range(3):
        for _ in range(FAILED_ADOPTIONS - 1):
            succession.on_death(CRASH)
        succession.on_death(HEALTHY)
        assert succession.adopts
    succession = Succession()
    succession.on_handover()
    assert succession.adopts
    for _ in range(3):
        for _ in range(FAILED_ADOPTIONS - 1):
            succession.on_death(CRASH)
        succession.on_handover()
        assert succession.adopts
