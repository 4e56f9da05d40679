"""Programs that write shared memory and are killed while they do so. Each prints counts as JSON.

    programs.py ring SEGMENT KILLS    a producer and a consumer, killed in turn
    programs.py board SEGMENT KILLS   a writer of a board that is killed again and again
    programs.py events SEGMENT KILLS  a writer of events that is killed again and again
    programs.py word SEGMENT HOW      alternates two patterns in a word, by `cast` or `pack_into`
    programs.py bell SEGMENT BELL     a producer that rings after each record

SEGMENT and BELL are descriptors, KILLS is the least number of kills. All programs except `ring` run until stdin is
closed. The module imports little and has one thread, so it can fork: a new process costs a millisecond.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import select
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
NEXT, EXPECTED, REPEATS, GAPS, CORRUPT = range(5)  # indices of the words in the page behind the ring
MAX_UNACKED = 5  # records that a consumer may leave unacknowledged
MIN_RECORDS = 1000  # that the consumer of `ring` receives
LAST_NUMBER = 0xFFFFFFFF  # marks the last record of `bell`


def message(number: int) -> bytes:
    """Return payload `number`: every byte depends on the number, the size varies."""
    return struct.pack("<I", number) + bytes([number % 251]) * (number * 7919 % 900)


def produce(ring: memoryview, words: memoryview) -> NoReturn:
    """Write the numbers in order. A kill between the commit of a record and the next store repeats a number."""
    writer = RingWriter(ring, os.getpid())
    while True:
        if writer.put(message(words[NEXT]), 1):
            words[NEXT] += 1


def consume(ring: memoryview, words: memoryview) -> NoReturn:
    """Count each record at once but acknowledge several together, so a kill makes the successor read some again."""
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
        if unacked > MAX_UNACKED:
            reader.ack()
            unacked = 0


def spawn(body: Callable[..., object], *args: object) -> int:
    """Fork a process that runs `body` and dies with its parent; return its pid."""
    parent, pid = os.getpid(), os.fork()
    if not pid:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            assert os.getppid() == parent
            body(*args)
        except BaseException as e:
            os.write(2, f"{body.__name__}: {e!r}\n".encode())
        os._exit(1)  # `body` returned or failed: it must end only by a kill
    return pid


def kill(pid: int) -> None:
    """Kill a process; exit if it had already ended by itself."""
    os.kill(pid, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        sys.exit("a process ended by itself")


def kill_ring_ends(memory: memoryview, kills: int) -> dict[str, int]:
    """Kill and restart producer and consumer in turn; return the counts of the consumer.

    Stop after `kills` kills when MIN_RECORDS records were received and a record was read a second time.
    """
    ring, words = memory[: 2 * PAGE + CAPACITY], memory[2 * PAGE + CAPACITY :].cast("Q")
    bodies = [produce, consume]
    processes = [spawn(body, ring, words) for body in bodies]
    turn = 0
    while turn < kills or words[EXPECTED] <= MIN_RECORDS or not words[REPEATS]:
        time.sleep(random.uniform(0.0005, 0.012))
        kill(processes[turn % 2])
        processes[turn % 2] = spawn(bodies[turn % 2], ring, words)
        turn += 1
    kill(processes[0])
    deadline = time.monotonic() + 20
    while words[EXPECTED] < words[NEXT] and time.monotonic() < deadline:
        time.sleep(0.001)
    kill(processes[1])
    names = ("sent", "received", "repeats", "gaps", "corrupt")
    return {name: words[i] for i, name in enumerate(names)} | {"kills": turn}


def stdin_closed() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def facts(number: int) -> bytes:
    """Return the facts of version `number`: every word is the version, the size varies."""
    return struct.pack("<Q", number) * (1 + number % 200)


def publish(board: memoryview) -> NoReturn:
    writer = BoardWriter(board)
    word = board[:8].cast("Q")
    while True:
        writer.publish(facts(word[0] + 1))


def numbered_event(number: int) -> Preempted:
    """Return event `number`; the size varies."""
    return Preempted(number, chr(97 + number % 26) * (1 + number * 31 % 150), number % 7)


def write_events(memory: memoryview) -> NoReturn:
    writer = EventWriter(memory)
    word = memory[:8].cast("Q")
    while True:
        writer.write(numbered_event(word[0]))


def kill_writer(body: Callable[..., object], memory: memoryview, min_kills: int) -> dict[str, int]:
    """Run `body` in a process that is killed and restarted again and again; return the number of kills."""
    kills = 0
    while kills < min_kills or not stdin_closed():
        pid = spawn(body, memory)
        time.sleep(random.uniform(0.002, 0.02))
        kill(pid)
        kills += 1
    return {"kills": kills}


def alternate(memory: memoryview, how: str) -> dict[str, int]:
    """Store the two patterns in turn; return the number of stores."""
    words, stores = memory.cast("Q"), 0
    while not stdin_closed():
        for _ in range(500):
            for pattern in PATTERNS:
                if how == "cast":
                    words[0] = pattern
                else:
                    struct.pack_into("@Q", memory, 0, pattern)
        stores += 1000
    return {"stores": stores}


def keep_ringing(ring: memoryview, bell: int) -> dict[str, int]:
    """Write records and ring after each; return their number.

    Sometimes wait until all records are acknowledged: then no later ring can hide a lost one.
    """
    writer, sent = RingWriter(ring, 1), 0
    tail, head = ring[:8].cast("Q"), ring[PAGE : PAGE + 8].cast("Q")
    while not stdin_closed():
        if writer.put(struct.pack("<I", sent), 1):
            sent += 1
            doorbell.ring(bell)
        chance = random.random()
        if chance < 0.4:  # often long enough for the consumer to wait, or to be about to wait
            time.sleep(random.uniform(0, 0.0002))
        elif chance < 0.6:
            while head[0] != tail[0]:
                os.sched_yield()
    while not writer.put(struct.pack("<I", LAST_NUMBER), 1):
        time.sleep(0.001)
    doorbell.ring(bell)
    return {"sent": sent}


def main(program: str, fd: str, *args: str) -> None:
    memory = segment.attach(int(fd))
    match program:
        case "ring":
            counts = kill_ring_ends(memory, int(args[0]))
        case "board":
            counts = kill_writer(publish, memory, int(args[0]))
        case "events":
            counts = kill_writer(write_events, memory, int(args[0]))
        case "word":
            counts = alternate(memory, args[0])
        case "bell":
            counts = keep_ringing(memory, int(args[0]))
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
