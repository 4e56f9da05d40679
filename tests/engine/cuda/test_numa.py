"""Threads stay on the CPUs of their GPU's NUMA node, if the machine reports the node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cuda.numa import cpus_near, parse_cpus, stay_near

GPU = "0000:1b:00.0"


def sysfs(root: Path, node: str, cpulist: str = "") -> Path:
    """Write a sysfs tree with one GPU at `node`, which has the CPUs `cpulist`."""
    device = root / "bus/pci/devices" / GPU
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    if cpulist:
        (root / f"devices/system/node/node{node}").mkdir(parents=True)
        (root / f"devices/system/node/node{node}/cpulist").write_text(f"{cpulist}\n")
    return root


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3\n", {0, 1, 2, 3}), ("0,2-3,9", {0, 2, 3, 9}), ("7", {7}), ("\n", set()), ("0-1,64-65\n", {0, 1, 64, 65})],
)
def test_lists_of_cpus(text: str, cpus: set[int]):
    assert parse_cpus(text) == cpus


@given(st.sets(st.integers(0, 300)))
def test_a_list_of_single_cpus_is_read_back(cpus: set[int]):
    assert parse_cpus(",".join(map(str, sorted(cpus)))) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "1;2", "-1", "1,,2"])
def test_an_invalid_list_is_rejected(text: str):
    with pytest.raises(ValueError, match="not a list of CPUs"):
        parse_cpus(text)


def test_the_node_of_a_device_is_found(tmp_path: Path):
    assert cpus_near(GPU, sysfs(tmp_path, "1", "48-50,99")) == cpus_near(GPU.upper(), tmp_path) == {48, 49, 50, 99}


@pytest.mark.parametrize(("node", "cpulist"), [("-1", ""), ("1", ""), ("x", ""), ("0", "many")])
def test_no_cpu_is_near_if_the_node_is_unknown(tmp_path: Path, node: str, cpulist: str):
    assert cpus_near(GPU, sysfs(tmp_path, node, cpulist)) == frozenset()
    assert cpus_near("0000:ff:00.0", tmp_path) == frozenset()


@pytest.mark.parametrize("cpulist", ["4000-4001", "0-4000"])
def test_nothing_changes_if_no_cpu_is_near_or_all_are(tmp_path: Path, cpulist: str):
    before = os.sched_getaffinity(0)
    assert stay_near(GPU, sysfs(tmp_path, "1", cpulist)) == frozenset()
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is only one CPU")
def test_existing_and_new_threads_stay_near(tmp_path: Path):
    """In a separate process, because the affinity cannot be undone here."""
    near = max(os.sched_getaffinity(0))
    sysfs(tmp_path, "1", str(near))
    script = f"""
import os, threading
from pathlib import Path
from daemon.engine.cuda.numa import stay_near
leave = threading.Event()
threading.Thread(target=leave.wait).start()
assert stay_near({GPU!r}, Path({str(tmp_path)!r})) == {{{near}}}
threading.Thread(target=leave.wait).start()
print(*(os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")))
leave.set()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{{{near}}}"] * 3
