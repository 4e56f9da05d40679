"""Imports run one way between the rooms, and heavy packages stay out of the light processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import itself and the rooms named here; `policy` is the pure part of `control`.
ALLOWED = {
    "ipc": set(),
    "models": set(),
    "kvpool": {"ipc"},
    "control/policy": {"ipc"},
    "control": {"ipc", "control/policy"},
    "supervisor": {"ipc"},
    "engine": {"ipc", "models", "kvpool", "control/policy"},
    "api": {"ipc", "models", "control/policy"},
    "sim": {"ipc", "kvpool", "engine", "control/policy"},
    "cli": {"ipc", "models", "engine", "api", "supervisor", "control/policy", "sim"},
}
PURE = [
    "daemon.kvpool.block_manager",
    "daemon.engine.scheduler",
    "daemon.engine.waiting_queue",
    "daemon.engine.migration.llumlet",
    "daemon.control.policy.ownership",
    "daemon.control.policy.rebalancing",
    "daemon.control.policy.scaling",
    "daemon.control.policy.projection",
    "daemon.engine.request",
    "daemon.engine.step_stats",
    "daemon.engine.cost",
    "daemon.engine.consensus",
    "daemon.api.prefix_affinity",
    "daemon.ipc.messages",
    "daemon.ipc.events",
    "daemon.control.policy.freeness",
    "daemon.control.policy.dispatch",
    "daemon.control.policy.priority",
    "daemon.ipc.arena",
    "daemon.engine.cuda.buckets",
    "daemon.engine.cuda.memory",
    "daemon.engine.cuda.slots",
    "daemon.cli.memory_budget",
]
LIGHT = [
    "daemon.cli.llumd",
    "daemon.supervisor.supervisor",
    "daemon.control.coordinator",
    "daemon.api.frontend",
    "daemon.engine.worker",
]
TORCHLESS = [
    "daemon.engine.cuda.arrays",
    "daemon.engine.cuda.kernels",
    "daemon.engine.cuda.compile",
    "daemon.kvpool.cuda_pools",
]
# Who may name FlashInfer and what comes with it; generate.py is a process of its own.
FLASHINFER = {"attention.py", "ops.py", "kernels.py", "generate.py"}


def imports(file: Path) -> set[str]:
    """The modules named in import statements, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def imported(file: Path, *, top: bool = False) -> set[str]:
    """The same, and `a.b` too for `from a import b`. `top`: only statements that run when the file is imported."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def room_of(module: str) -> str:
    """The room of a module below `daemon`; "" for the ground floor (`daemon`, `daemon.config`)."""
    parts = module.split(".")
    if parts[1:3] == ["control", "policy"]:
        return "control/policy"
    return parts[1] if len(parts) > 1 and (ROOT / "daemon" / parts[1]).is_dir() else ""


def modules() -> dict[str, Path]:
    """Every module of the import package and its file."""
    files = (ROOT / "daemon").rglob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def test_every_room_is_named():
    assert {room_of(module) for module in modules()} - {""} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    for module, file in modules().items():
        if room_of(module) == room:
            for name in imported(file):
                if name.split(".")[0] == "daemon":
                    assert room_of(name) in {"", room, *ALLOWED[room]}, f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    """Imports at the top of a file alone: one inside a function is run when both files are whole."""
    known = modules()
    arrows = {module: {name for name in imported(file, top=True) if name in known} for module, file in known.items()}
    while ends := [module for module, names in arrows.items() if not names]:
        for module in ends:
            del arrows[module]
        for names in arrows.values():
            names.difference_update(ends)
    assert not arrows


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        (PURE, ["torch", "numpy", "numba", "aiohttp", "posix_ipc"]),
        (LIGHT, ["torch", "numba", "transformers"]),
        (["daemon.supervisor.supervisor"], ["aiohttp", "tokenizers"]),
        (TORCHLESS, ["torch", "flashinfer", "tvm_ffi"]),
        (["daemon.engine.build_runner", "daemon.engine.cpu.runner"], ["daemon.engine.cuda", "flashinfer", "tvm_ffi"]),
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
