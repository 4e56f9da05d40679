"""Writes the stream of `expected` to an inherited TCP socket, in pieces of random sizes, until it is killed.

    socket_writer.py FD SEED LENGTH...    each LENGTH but the last: a response that ends, before which it reads a line

It imports nothing of the project, so it starts fast.
"""

from __future__ import annotations

import random
import socket
import sys

_PATTERN = random.Random(0).randbytes(65521)  # a prime length: an offset that is wrong shows at once


def expected(start: int, end: int) -> bytes:
    """Return the bytes [start, end) of the stream."""
    first = start % len(_PATTERN)
    repeats = (first + end - start) // len(_PATTERN) + 1
    return (_PATTERN * repeats)[first : first + end - start]


def main() -> None:
    sock, numbers = socket.socket(fileno=int(sys.argv[1])), random.Random(int(sys.argv[2]))
    position = 0
    for length in map(int, sys.argv[3:]):
        sock.recv(1)  # the request of this response
        end = position + length
        while position < end:
            size = min(numbers.choice((1, 7, 300, 5000, 70_000)), end - position)
            sock.sendall(expected(position, position + size))
            position += size
    raise AssertionError("the test should have killed this process")


if __name__ == "__main__":
    main()
