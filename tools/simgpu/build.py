"""Compiles the simulated libraries into the cache, once for each PyTorch, with the system's C compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from daemon.directories import cache_dir
from daemon.engine.cuda import toolkit
from daemon.engine.cuda.kernels import KernelError
from tests.engine.cuda import host_kernels

RUNTIME = Path(__file__).with_name("runtime.c")
CUBLASLT = Path(__file__).with_name("cublaslt.c")
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-shared", "-fPIC")
CUDART = "libcudart.so.13"

# The functions of the stubs from which a caller expects more than success.
_HANDLE = "int {name}(void **handle) {{ *handle = (void *)16; return 0; }}"
_ZERO = "int {name}(void *handle, int *value) {{ *value = 0; return 0; }}"
_SPECIAL = {
    "cublasCreate_v2": _HANDLE,
    "cublasGetMathMode": _ZERO,
    "cublasGetPointerMode_v2": _ZERO,
    "cublasLtGetVersion": "unsigned long {name}(void) {{ return 130000; }}",
    "cuCtxGetCurrent": _HANDLE,
    "cuMemGetAddressRange_v2": "extern int sim_address_range(void *, void *, unsigned long) __attribute__((weak));\n"
    "int {name}(void *base, void *size, unsigned long pointer)"
    " {{ return sim_address_range ? sim_address_range(base, size, pointer) : 1; }}",
}
_NOT_SUPPORTED = "int {name}(void) {{ return 801; }}"
_SUCCESS = "int {name}(void) {{ return 0; }}"
_PRODUCT = (
    "extern void sim_product(const char *) __attribute__((weak));\n"
    'int {name}(void) {{ if (sim_product) sim_product("{name}"); return 0; }}'
)
_PRODUCTS = re.compile(r"cublas(LtMatmul|\w*[Gg]emm\w*)")


class BuildError(Exception):
    """The simulation cannot be built on this machine. The message gives the cause."""


def build() -> list[Path]:
    """Build the libraries, and return them in the order in which to preload them. Raises BuildError."""
    torch_libraries = _torch_libraries()
    wanted = _imported(torch_libraries)
    sources = {
        "libcuda.so.1": [_stubs(wanted[""] | {"cuMemGetAddressRange_v2"}, _SUCCESS)],
        CUDART: [RUNTIME.read_text(), _stubs(_missing(wanted[CUDART], RUNTIME), _NOT_SUPPORTED)],
        "libcublas.so.13": [_stubs(wanted["libcublas.so.13"], _SUCCESS)],
        "libcublasLt.so.13": [
            CUBLASLT.read_text(),
            _stubs(_missing(wanted["libcublasLt.so.13"], CUBLASLT), _SUCCESS),
        ],
    }
    digest = hashlib.sha256(repr((FLAGS, sorted(sources.items()))).encode()).hexdigest()[:12]
    where = cache_dir() / "simgpu" / digest
    if not where.exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where.parent) as scratch:
            for name, texts in sources.items():
                compile_library(Path(scratch), name, texts)
            made = Path(scratch).rename(where)
            Path(scratch).mkdir()
            return [made / name for name in sources]
    return [where / name for name in sources]


def build_host(name: str) -> Path:
    """Compile one of our own kernels ("draw", "append" or "gemv") for the CPU. Raises BuildError."""
    key = repr(host_kernels.FLAGS).encode() + b"".join(s.read_bytes() for s in host_kernels.sources_of(name))
    library = cache_dir() / "simgpu" / f"host_{name}_{hashlib.sha256(key).hexdigest()[:12]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            try:
                host_kernels.compile_host(name, Path(scratch)).rename(library)
            except subprocess.CalledProcessError as e:
                raise BuildError(f"c++ cannot compile host_{name}.cpp: {e.stderr[-2000:]}") from None
    return library


def compile_library(folder: Path, name: str, texts: Sequence[str]) -> Path:
    """Compile `texts` to a shared library. Its symbols have its name as their version, as in CUDA.

    Raises BuildError.
    """
    sources = [folder / f"{name}.{i}.c" for i in range(len(texts))]
    for source, text in zip(sources, texts, strict=True):
        source.write_text(text)
    command = [
        "cc",
        *FLAGS,
        f"-I{_headers()}",
        *map(str, sources),
        "-o",
        str(folder / name),
        f"-Wl,-soname,{name}",
        "-pthread",
    ]
    if name != "libcuda.so.1":  # the driver's symbols have no version
        versions = folder / f"{name}.map"
        versions.write_text(f"{name} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={versions}")
    _compile(command)
    return folder / name


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} cannot compile the simulation: {done.stderr[-2000:]}")


def _headers() -> Path:
    try:
        include = toolkit.toolchain().home / "include"
    except KernelError as e:
        raise BuildError(str(e)) from None
    if not (include / "cuda_runtime_api.h").exists():
        raise BuildError(f"{include} holds no cuda_runtime_api.h; install the CUDA toolkit's headers")
    return include


def _torch_libraries() -> list[Path]:
    found = importlib.util.find_spec("torch")
    libraries = sorted(Path(found.origin).parent.glob("lib/*.so")) if found and found.origin else []
    if not any(library.name == "libtorch_cuda.so" for library in libraries):
        raise BuildError("PyTorch here is not built for CUDA; LLUMD_TORCH=cuda bin/test sets up one that is")
    return libraries


def _imported(libraries: Iterable[Path]) -> dict[str, set[str]]:
    """Return the CUDA functions that `libraries` need, by library. Those of the driver have no version: ""."""
    names: dict[str, set[str]] = {}
    for library in libraries:
        output = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
        ).stdout
        for name, version in re.findall(r"\b((?:cu[A-Z]|cuda|cublas|__cuda)\w*)(?:@(\S+))?$", output, re.MULTILINE):
            names.setdefault(version, set()).add(name)
    names[""] = {name for name in names.get("", set()) if re.match(r"cu[A-Z]", name)}
    return names


def _missing(wanted: set[str], source: Path) -> set[str]:
    """Return the functions that `source` does not have. No code here calls them, but the loader needs them."""
    return wanted - set(re.findall(r"^EXPORT .*?(\w+)\(", source.read_text(), re.M))


def _stubs(names: set[str], otherwise: str) -> str:
    def stub(name: str) -> str:
        text = _PRODUCT if _PRODUCTS.fullmatch(name) else _SPECIAL.get(name, otherwise)
        return text.format(name=name) + "\n"

    return "".join(map(stub, sorted(names)))
