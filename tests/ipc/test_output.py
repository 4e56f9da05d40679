"""Streams whose writes cannot fail."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from daemon.ipc.output import _stream


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        try:
            os.close(fd)
        except OSError:
            continue


def test_a_reader_gets_everything_also_slowly(pipe: tuple[int, int]) -> None:
    read, write = pipe
    text = "".join(f"line {i} é\n" for i in range(20_000))
    found = io.BytesIO()

    def drain() -> None:
        while data := os.read(read, 50_000):
            found.write(data)
            time.sleep(0.001)

    reader = threading.Thread(target=drain)
    reader.start()
    stream = _stream(write)
    stream.write(text)
    stream.close()
    os.close(write)
    reader.join()
    assert found.getvalue().decode() == text


@pytest.mark.parametrize("where", ["closed pipe", "/dev/full", "closed descriptor"])
def test_output_that_cannot_be_written_is_lost(pipe: tuple[int, int], where: str) -> None:
    read, write = pipe
    os.close(read)
    if where == "/dev/full":
        write = os.open("/dev/full", os.O_WRONLY)
    stream = _stream(write)
    if where == "closed descriptor":
        os.close(write)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)


def test_a_reader_that_does_not_read_costs_one_wait_until_it_reads(pipe: tuple[int, int]) -> None:
    read, write = pipe
    stream = _stream(write)
    for _ in range(1000):  # at 0.2 s each these would take minutes
        print("x" * 1000, file=stream)
    while len(os.read(read, 65536)) == 65536:
        pass
    print("again", file=stream)
    assert os.read(read, 65536).endswith(b"again\n")


def test_a_terminal_that_does_not_read_blocks_nothing() -> None:
    master, slave = pty.openpty()
    stream = _stream(slave)
    began = time.monotonic()
    for _ in range(300):
        print("x" * 1000, file=stream, flush=True)
    assert time.monotonic() - began < 10
    assert os.get_blocking(slave)  # the terminal is the shell's, too
    os.close(slave)
    stream.close()
    os.close(master)


def test_characters_that_the_terminal_does_not_have() -> None:
    code = "from daemon.ipc import output; output.tolerate_loss(); print('\\u2713 \\udc80')"
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "\\udc80" in done.stdout


def test_closed_descriptors_become_null_and_reach_children() -> None:
    code = (
        "import os, subprocess; os.closerange(0, 3)\n"
        "from daemon.ipc import output; output.tolerate_loss(); print('lost')\n"
        "assert all(os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev for fd in (0, 1, 2))\n"
        "assert subprocess.run(['sh', '-c', 'echo lost'], check=False).returncode == 0\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
