"""The tools that compile kernels: nvcc, ninja and a C++ compiler, and where they are found.

The extra `cuda` installs nvcc from PyPI beside PyTorch, in the version of CUDA that PyTorch has.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.engine.cuda.kernels import KernelError, major

_SYSTEM = Path("/usr/local/cuda")
_INSTALL_CXX = "`sudo apt install g++` (Debian, Ubuntu), `sudo dnf install gcc-c++` (Fedora, RHEL)"
_ELSEWHERE = "build on another machine and take its kernels with `llumd kernels pack` and `unpack`"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The tools of a build. `home`: the toolkit's directory, also if the nvcc found is a wrapper in another place."""

    nvcc: Path
    home: Path
    version: str  # "13.0"
    ninja: Path
    cxx: str


def toolchain() -> Toolchain:
    """Find nvcc, ninja and a C++ compiler.

    nvcc is the one in $CUDA_HOME, or else the first of the same major version as PyTorch's CUDA: beside PyTorch, on
    PATH, in /usr/local/cuda. Raises KernelError that says what to install.
    """
    nvcc, version = _find_nvcc(torch_cuda_version())
    # pip installs ninja beside Python, which may be missing on PATH.
    ninja = shutil.which("ninja", path=f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}")
    if ninja is None:
        raise KernelError(
            "ninja is not on PATH; install it: `pip install ninja`, or the system's package ninja-build"
        )
    named = os.environ.get("CXX", "c++")
    cxx = shutil.which(named)
    if cxx is None:
        raise KernelError(
            f"no C++ compiler: {named} is not on PATH, and nvcc needs one; install g++: {_INSTALL_CXX}, "
            f"or set CXX, or {_ELSEWHERE}"
        )
    return Toolchain(nvcc, _home(nvcc), version, Path(ninja), cxx)


def check_arch(tools: Toolchain, arch: str) -> None:
    """Raise KernelError unless this nvcc compiles for `arch`."""
    known = re.findall(r"compute_(\d+)(\d)\b", _tool_output(tools.nvcc, "--list-gpu-arch"))
    major, minor = arch.rstrip("af").split(".")
    if known and (major, minor) not in known:
        names = ", ".join(f"{a}.{b}" for a, b in sorted(known, key=lambda k: (int(k[0]), k[1])))
        raise KernelError(f"nvcc {tools.version} does not compile for {arch}; it supports {names}")


def torch_cuda_version() -> str | None:
    """Return the CUDA version of the installed PyTorch without importing it. None: a build for the CPU, or none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    return torch_cuda(Path(found.origin).with_name("version.py"))


def torch_cuda(version_file: Path) -> str | None:
    """Return the CUDA version of a PyTorch build, from its version.py. None for a build without CUDA."""
    try:
        text = version_file.read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _find_nvcc(cuda: str | None) -> tuple[Path, str]:
    """Return an nvcc and its version. `cuda`: PyTorch's version; None: any will do."""
    home = _named_home()
    if home:
        if not (home / "bin" / "nvcc").is_file():
            raise KernelError(f"CUDA_HOME is {home}, which has no bin/nvcc")
        version = _nvcc_version(home / "bin" / "nvcc")
        if not _same_major(version, cuda):
            raise KernelError(
                f"CUDA_HOME is {home}, which has CUDA {version}, but PyTorch here has CUDA {cuda} and cannot load "
                f"such kernels; set CUDA_HOME to a toolkit of that major version, or unset it"
            )
        return home / "bin" / "nvcc", version
    others = []
    for nvcc in _candidates():
        version = _nvcc_version(nvcc)
        if _same_major(version, cuda):
            return nvcc, version
        others.append(f"{nvcc} has CUDA {version}, PyTorch here has {cuda}; ")
    raise KernelError(
        f"{''.join(others)}no {'other ' if others else ''}nvcc beside PyTorch, on PATH or in {_SYSTEM}. "
        f"{_how_to_install(cuda)}, or set CUDA_HOME to the directory of a CUDA toolkit, or {_ELSEWHERE}"
    )


def _how_to_install(cuda: str | None) -> str:
    if cuda is None:  # the extra would bring the CUDA version of a PyTorch that is not there
        return "`LLUMD_TORCH=cuda bin/llumd kernels build` installs it, without a GPU too"
    return f"`{sys.executable} -m pip install 'cuda-toolkit[nvcc,cccl]=={cuda}.*'` installs it"


def _candidates() -> Iterator[Path]:
    """Yield every nvcc, the preferred one first: the one from PyPI has PyTorch's minor version, too."""
    found = importlib.util.find_spec("nvidia")
    for site in found.submodule_search_locations or [] if found else []:
        yield from (nvcc for nvcc in sorted(Path(site).glob("cu*/bin/nvcc")) if os.access(nvcc, os.X_OK))
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    if (_SYSTEM / "bin" / "nvcc").is_file():
        yield _SYSTEM / "bin" / "nvcc"


def _nvcc_version(nvcc: Path) -> str:
    output = _tool_output(nvcc, "--version")
    version = re.search(r"release (\d+\.\d+),", output)
    if version is None:
        raise KernelError(f"{nvcc} does not work: {output.strip()[-300:]}")
    return version[1]


def _same_major(version: str, cuda: str | None) -> bool:
    return cuda is None or major(version) == major(cuda)


def _named_home() -> Path | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(named) if named else None


def _home(nvcc: Path) -> Path:
    """Return the toolkit's directory. Ask nvcc for it: a wrapper on PATH may be in another place."""
    here = re.search(r"_HERE_=(\S+)", _tool_output(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"))
    return _named_home() or (Path(here[1]).parent if here else nvcc.resolve().parent.parent)


def _tool_output(program: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            [program, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise KernelError(f"cannot run {program}: {e}") from None
    return done.stdout
