"""Imports between packages follow one direction, and light processes do not import heavy packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package may import itself and the packages in its set. `control/policy` is the pure part of `control`.
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
    "daemon.engine.migration.actions",
    "daemon.engine.migration.source",
    "daemon.engine.migration.destination",
    "daemon.api.prefix_affinity",
    "daemon.api.admission",
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
    "daemon.units",
    "daemon.supervisor.restarts",
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
    "daemon.kvpool.cuda_transport",
]
# Files that may import FlashInfer and its packages. generate.py runs in a separate process.
FLASHINFER = {"attention.py", "ops.py", "kernels.py", "generate.py"}


def imports(file: Path) -> set[str]:
    """Return the modules in the import statements of a file, also of those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def imported(file: Path, *, top: bool = False) -> set[str]:
    """Return the same, and also `a.b` for `from a import b`. `top`: only statements that run on import."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def package_of(module: str) -> str:
    """Return the package of a module below `daemon`; "" for modules directly in it, such as `daemon.config`."""
    parts = module.split(".")
    if parts[1:3] == ["control", "policy"]:
        return "control/policy"
    return parts[1] if len(parts) > 1 and (ROOT / "daemon" / parts[1]).is_dir() else ""


def modules() -> dict[str, Path]:
    """Return the file of every module of `daemon`."""
    files = (ROOT / "daemon").rglob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def test_every_package_has_a_rule():
    assert {package_of(module) for module in modules()} - {""} == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_allowed_packages(package):
    for module, file in modules().items():
        if package_of(module) == package:
            for name in imported(file):
                if name.split(".")[0] == "daemon":
                    assert package_of(name) in {"", package, *ALLOWED[package]}, f"{module} imports {name}"


def test_there_are_no_import_cycles():
    """Only imports at the top of a file count. An import in a function runs when both files are loaded."""
    known = modules()
    imports_of = {
        module: {name for name in imported(file, top=True) if name in known} for module, file in known.items()
    }
    while leaves := [module for module, names in imports_of.items() if not names]:
        for module in leaves:
            del imports_of[module]
        for names in imports_of.values():
            names.difference_update(leaves)
    assert not imports_of


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        (PURE, ["torch", "numpy", "numba", "aiohttp", "posix_ipc"]),
        (LIGHT, ["torch", "numba", "transformers", "huggingface_hub"]),
        (["daemon.supervisor.supervisor"], ["aiohttp", "tokenizers"]),
        (TORCHLESS, ["torch", "flashinfer", "tvm_ffi"]),
        (["daemon.engine.build_runner", "daemon.engine.cpu.runner"], ["daemon.engine.cuda", "flashinfer", "tvm_ffi"]),
        (["daemon.engine.cuda.runner"], ["flashinfer", "tvm_ffi"]),
    ],
)
def test_light_modules_do_not_import_heavy_packages(modules, banned):
    lines = [f"import {m}" for m in modules] + ["import sys", f"print([b for b in {banned!r} if b in sys.modules])"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


def test_only_commands_and_the_download_import_the_library_of_the_hub():
    """It is slow to import and starts threads, so the daemon downloads in a process of its own."""
    models = ROOT / "daemon" / "models"
    allowed = {models / "hub" / "download.py", models / "hub" / "errors.py", models / "inventory.py"}
    for file in (ROOT / "daemon").rglob("*.py"):
        if "huggingface_hub" in {name.split(".")[0] for name in imports(file)}:
            assert file in allowed, file


def test_only_few_files_import_flashinfer():
    for file in (ROOT / "daemon").rglob("*.py"):
        packages = {name.split(".")[0] for name in imports(file)}
        if packages & {"flashinfer", "tvm_ffi"}:
            assert file.parent == ROOT / "daemon" / "engine" / "cuda" and file.name in FLASHINFER, file


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_use_no_clock_and_no_io(module):
    file = ROOT / (module.replace(".", "/") + ".py")
    assert not imports(file) & {"time", "random", "os", "secrets", "socket", "mmap", "io", "asyncio", "threading"}


def test_test_files_have_different_names():
    """pytest imports them by their names alone: of two with the same name it refuses the second."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
