"""Imports run one way between the rooms, and heavy packages stay out of the light processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# room -> rooms it may import
ALLOWED = {
    "models": {"models"},
    "kvpool": {"kvpool", "control"},
    "control": {"control"},
    "engine": {"engine", "control", "kvpool", "models"},
    "api": {"api", "control", "models"},
}
PURE = [
    "daemon.kvpool.blocks",
    "daemon.engine.scheduler",
    "daemon.engine.waiting",
    "daemon.engine.llumlet",
    "daemon.control.ownership",
    "daemon.control.rebalance",
    "daemon.control.scaling",
    "daemon.control.outlook",
    "daemon.engine.request",
    "daemon.engine.pace",
    "daemon.engine.cost",
    "daemon.engine.yardstick",
    "daemon.api.affinity",
    "daemon.control.messages",
    "daemon.control.events",
    "daemon.control.load",
    "daemon.control.dispatch",
    "daemon.control.priority",
    "daemon.control.extents",
    "daemon.engine.cuda.buckets",
    "daemon.engine.cuda.memory",
    "daemon.engine.cuda.slots",
    "daemon.sizing",
]
LIGHT = [
    "daemon.cli",
    "daemon.supervisor",
    "daemon.control.coordinator",
    "daemon.api.frontend",
    "daemon.engine.worker",
]
TORCHLESS = [
    "daemon.engine.cuda.arrays",
    "daemon.engine.cuda.kernels",
    "daemon.engine.cuda.compile",
    "daemon.kvpool.cuda_ipc",
]
# Who may name FlashInfer and what comes with it; generate.py is a process of its own.
FLASHINFER = {"attention.py", "ops.py", "kernels.py", "generate.py"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    for file in (ROOT / "daemon" / room).rglob("*.py"):
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "daemon" and len(parts) > 1 and (ROOT / "daemon" / parts[1]).is_dir():
                assert parts[1] in ALLOWED[room], f"{file.name} imports {name}"


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        (PURE, ["torch", "numpy", "numba", "aiohttp", "posix_ipc"]),
        (LIGHT, ["torch", "numba", "transformers"]),
        (["daemon.supervisor"], ["aiohttp", "tokenizers"]),
        (TORCHLESS, ["torch", "flashinfer", "tvm_ffi"]),
        (["daemon.engine.build", "daemon.engine.runner_cpu"], ["daemon.engine.cuda", "flashinfer", "tvm_ffi"]),
        (["daemon.engine.cuda.runner"], ["flashinfer", "tvm_ffi"]),
    ],
)
def test_light_modules_stay_light(modules, banned):
    lines = [f"import {m}" for m in modules] + ["import sys", f"print([b for b in {banned!r} if b in sys.modules])"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


def test_flashinfer_is_named_by_few_and_enters_with_the_gpu_alone():
    for file in (ROOT / "daemon").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(file)}
        if roots & {"flashinfer", "tvm_ffi"}:
            assert file.parent == ROOT / "daemon" / "engine" / "cuda" and file.name in FLASHINFER, file


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_read_no_clock_and_open_nothing(module):
    file = ROOT / (module.replace(".", "/") + ".py")
    assert not imports(file) & {"time", "random", "os", "secrets", "socket", "mmap", "io", "asyncio", "threading"}
