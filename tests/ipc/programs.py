"""Processes to kill: run as a program, with the descriptors of the memory to work on.

    torture.py ring  SEGMENT KILLS   producer and consumer, killed in turn; prints what was seen, as JSON
    torture.py board SEGMENT SECONDS a writer that is killed again and again; prints the kills
    torture.py events SEGMENT SECONDS a writer of events that is killed again and again; prints the kills
    torture.py word  SEGMENT SECONDS HOW  one that alternates two patterns in a word, by `cast` or `pack_into`
    torture.py bell  SEGMENT BELL SECONDS a producer that rings after each record

It imports little and has one thread, so it may fork: a new victim costs a millisecond.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from daemon.ipc import doorbell, segment
from daemon.ipc.board import BoardWriter
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Preempted
from daemon.ipc.ring import PAGE, RingReader, RingWriter

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
PATTERNS = (0x1111111122222222, 0xEEEEEEEEDDDDDDDD)
CAPACITY = 8192
NEXT, EXPECTED, REPEATS, GAPS, CORRUPT = range(5)  # words of the page behind the ring
BATCH = 5  # records that a consumer may leave unacknowledged
LAST = 0xFFFFFFFF


def message(number: int) -> bytes:
    """A payload that says its number in every byte; its size varies."""
    return struct.pack("<I", number) + bytes([number % 251]) * (number * 7919 % 900)


def produce(ring: memoryview, words: memoryview) -> NoReturn:
    """Number follows number; the next one is noted after its record is committed, so death may repeat it."""
    writer = RingWriter(ring, os.getpid())
    while True:
        if writer.put(message(words[NEXT]), 1):
            words[NEXT] += 1


def consume(ring: memoryview, words: memoryview) -> NoReturn:
    """Takes effect record by record, acknowledges now and then: death sees records again."""
    reader = RingReader(ring)
    unacked = 0
    while True:
        record = reader.read()
        if record is None:
            reader.ack()
            unacked = 0
            continue
        number = struct.unpack_from("<I", record.payload)[0]
        if record.payload != message(number):
            words[CORRUPT] += 1
        elif number == words[EXPECTED]:
            words[EXPECTED] += 1
        else:
            words[REPEATS if number < words[EXPECTED] else GAPS] += 1
        unacked += 1
        if unacked > BATCH:
            reader.ack()
            unacked = 0


def spawn(body: Callable[..., object], *args: object) -> int:
    parent, pid = os.getpid(), os.fork()
    if not pid:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            assert os.getppid() == parent
            body(*args)
        except BaseException as e:
            os.write(2, f"{body.__name__}: {e!r}\n".encode())
        os._exit(1)  # a victim only ever ends by being killed
    return pid


def slay(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        sys.exit("a victim ended by itself")


def torture_ring(memory: memoryview, kills: int) -> dict[str, int]:
    ring, words = memory[: 2 * PAGE + CAPACITY], memory[2 * PAGE + CAPACITY :].cast("Q")
    bodies = [produce, consume]
    victims = [spawn(body, ring, words) for body in bodies]
    for kill in range(kills):
        time.sleep(random.uniform(0.0005, 0.012))
        slay(victims[kill % 2])
        victims[kill % 2] = spawn(bodies[kill % 2], ring, words)
    slay(victims[0])
    deadline = time.monotonic() + 20
    while words[EXPECTED] < words[NEXT] and time.monotonic() < deadline:
        time.sleep(0.001)
    slay(victims[1])
    names = ("sent", "received", "repeats", "gaps", "corrupt")
    return {name: words[i] for i, name in enumerate(names)}


def facts(number: int) -> bytes:
    """What a board of version `number` says: of varying size, each word the version."""
    return struct.pack("<Q", number) * (1 + number % 200)


def publish(slot: memoryview) -> NoReturn:
    writer = BoardWriter(slot)
    word = slot[:8].cast("Q")
    while True:
        writer.publish(facts(word[0] + 1))


def happening(number: int) -> Preempted:
    """Event `number`, of varying size."""
    return Preempted(number, chr(97 + number % 26) * (1 + number * 31 % 150), number % 7)


def happen(memory: memoryview) -> NoReturn:
    log = EventWriter(memory)
    word = memory[:8].cast("Q")
    while True:
        log.write(happening(word[0]))


def torture_writer(body: Callable[..., object], memory: memoryview, seconds: float) -> dict[str, int]:
    kills, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        victim = spawn(body, memory)
        time.sleep(random.uniform(0.002, 0.02))
        slay(victim)
        kills += 1
    return {"kills": kills}


def alternate(memory: memoryview, seconds: float, how: str) -> dict[str, int]:
    words, stores, end = memory.cast("Q"), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(500):
            for pattern in PATTERNS:
                if how == "cast":
                    words[0] = pattern
                else:
                    struct.pack_into("@Q", memory, 0, pattern)
        stores += 1000
    return {"stores": stores}


def keep_ringing(ring: memoryview, bell: int, seconds: float) -> dict[str, int]:
    """Now and then nothing more is sent before all is acknowledged: then no later ring makes up for a lost one."""
    writer, sent, end = RingWriter(ring, 1), 0, time.monotonic() + seconds
    tail, head = ring[:8].cast("Q"), ring[PAGE : PAGE + 8].cast("Q")
    while time.monotonic() < end:
        if writer.put(struct.pack("<I", sent), 1):
            sent += 1
            doorbell.ring(bell)
        chance = random.random()
        if chance < 0.4:  # often long enough for the consumer to fall asleep, or to be about to
            time.sleep(random.uniform(0, 0.0002))
        elif chance < 0.6:
            while head[0] != tail[0]:
                os.sched_yield()
    while not writer.put(struct.pack("<I", LAST), 1):
        time.sleep(0.001)
    doorbell.ring(bell)
    return {"sent": sent}


def main(what: str, fd: str, *args: str) -> None:
    memory = segment.attach(int(fd))
    match what:
        case "ring":
            seen = torture_ring(memory, int(args[0]))
        case "board":
            seen = torture_writer(publish, memory, float(args[0]))
        case "events":
            seen = torture_writer(happen, memory, float(args[0]))
        case "word":
            seen = alternate(memory, float(args[0]), args[1])
        case "bell":
            seen = keep_ringing(memory, int(args[0]), float(args[1]))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
