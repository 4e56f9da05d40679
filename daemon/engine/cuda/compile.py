"""Compiles kernels ahead of time, with nvcc and ninja and without a GPU.

Kernels are compiled one after the other, each with as many compilers as fit. A kernel is compiled in a scratch
directory and renamed into its place when it is complete. So a build that is killed leaves nothing that a later one
takes for a kernel. The next build waits until the last orphaned compiler has ended, and skips the kernels that are
already in place.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from daemon.engine.cuda import generate, kernels
from daemon.engine.cuda.kernels import RECORD, KernelError, KernelSpec
from daemon.engine.cuda.toolkit import Toolchain, check_arch, toolchain

Progress = Callable[[str], None]

_UNFINISHED = ".unfinished"
_COMPILER_BYTES = 3 << 30  # memory of one nvcc that compiles FlashInfer's attention templates
_UNUSED_HEADERS = ("cublasLt.h", "cublas_v2.h", "curand_kernel.h")  # the norm includes them and uses nothing of them
_FULL = "No space left on device"
_ENDING = 10.0  # seconds until ninja, told to end, is killed


def build(
    specs: Sequence[KernelSpec], arch: str, where: Path, progress: Progress, *, jobs: int = 0
) -> list[KernelSpec]:
    """Compile the `specs` that `where` does not hold, or that another nvcc or tvm-ffi compiled, and return them.

    `jobs`: number of parallel compilers; 0: as many as CPUs and memory allow. Kernels that are complete before a
    failure stay. Raises KernelError.
    """
    tools = toolchain()
    check_arch(tools, arch)
    tvm_ffi = kernels.package_version("apache-tvm-ffi")
    try:
        where.mkdir(parents=True, exist_ok=True)
        with lock(where / ".lock", progress) as held:
            wanted = [s for s in specs if not _current(where, s, tools, tvm_ffi)]
            progress(
                f"{len(wanted)} of {len(specs)} kernels to compile for {arch} with nvcc {tools.version} in {where}"
            )
            if wanted:
                _build_all(wanted, arch, where, tools, tvm_ffi, held, progress, jobs or _fitting_jobs())
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise KernelError(_disk_full(where)) from None
        raise KernelError(
            f"cannot store kernels in {where}: {e.strerror or e}; set $LLUMD_KERNELS to another directory"
        ) from None
    return wanted


def _current(where: Path, spec: KernelSpec, tools: Toolchain, tvm_ffi: str) -> bool:
    built = kernels.find(where, spec.name)
    return built is not None and (built.nvcc, built.tvm_ffi) == (tools.version, tvm_ffi)


def _fitting_jobs() -> int:
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // _COMPILER_BYTES))


@contextmanager
def lock(file: Path, progress: Progress) -> Iterator[int]:
    """Hold the lock of a build. Compilers inherit the descriptor, so the lock of a killed build is held until its
    last compiler ends."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build of these kernels")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _build_all(
    specs: list[KernelSpec], arch: str, where: Path, tools: Toolchain, tvm_ffi: str, held: int, progress: Progress,
    jobs: int,
) -> None:  # fmt: skip
    scratch = where / _UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        ninja_files = _generate(specs, scratch, _environment(tools, arch, scratch), held)
        for i, spec in enumerate(specs, 1):
            title = f"[{i}/{len(specs)}] {spec.purpose}"
            progress(f"{title}: compiling {spec.name}")
            began = time.monotonic()
            log = where / f"{spec.name}.log"
            library = _compile(spec, Path(ninja_files[spec.name]), log, tools, jobs, scratch, held)
            size = install(spec.name, library, where, scratch, {"nvcc": tools.version, "tvm_ffi": tvm_ffi})
            shutil.rmtree(library.parent)
            log.unlink()
            progress(f"{title}: {time.monotonic() - began:.0f} s, {size / 2**20:.1f} MiB")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _environment(tools: Toolchain, arch: str, scratch: Path) -> dict[str, str]:
    """Return the environment for FlashInfer's import. Its settings in our environment are removed, so that the flags
    are the same on every machine."""
    links = scratch / "lib"
    _make_links(tools, links)
    _make_headers(tools, scratch / generate.EMPTY_HEADERS)
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLASHINFER_")}
    folders = [tools.home / "lib64", tools.home / "lib", links]
    return env | {
        "CUDA_HOME": str(tools.home),
        "FLASHINFER_NVCC": str(tools.nvcc),
        "FLASHINFER_CUDA_ARCH_LIST": arch,
        "FLASHINFER_WORKSPACE_BASE": str(scratch),
        "FLASHINFER_EXTRA_LDFLAGS": " ".join(f"-L{folder}" for folder in folders),
        "TMPDIR": str(scratch),
    }


def _make_links(tools: Toolchain, links: Path) -> None:
    """Make libraries to link with: an empty libcuda, because there may be no driver; libcudart without a version."""
    links.mkdir()
    stub = str(links / "libcuda.so")
    command = [tools.cxx, "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c++", "/dev/null", "-o", stub]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(_disk_full(links) if _FULL in done.stderr else f"{tools.cxx} does not work: {done.stderr}")
    for folder in (tools.home / "lib64", tools.home / "lib"):
        for versioned in sorted(folder.glob("libcudart.so.*")):
            (links / "libcudart.so").unlink(missing_ok=True)
            (links / "libcudart.so").symlink_to(versioned)


def _make_headers(tools: Toolchain, headers: Path) -> None:
    """Make empty headers of unused libraries, for a toolkit that has only the compiler."""
    headers.mkdir()
    for name in _UNUSED_HEADERS:
        if not (tools.home / "include" / name).exists():
            (headers / name).touch()


def _generate(specs: list[KernelSpec], scratch: Path, env: dict[str, str], held: int) -> dict[str, str]:
    """Run FlashInfer, which writes sources and ninja files. Return name -> ninja file."""
    request = json.dumps([[s.name, s.generator, s.args] for s in specs])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "daemon.engine.cuda.generate"],
        input=request, env=env, cwd=scratch, capture_output=True, text=True, check=False, pass_fds=(held,),
    )  # fmt: skip
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KernelError(_disk_full(scratch) if _FULL in done.stderr else f"FlashInfer cannot prepare them: {why}")
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _compile(
    spec: KernelSpec, ninja_file: Path, log: Path, tools: Toolchain, jobs: int, scratch: Path, held: int
) -> Path:
    """Run ninja, and return the library that it makes."""
    command = [str(tools.ninja), "-v", "-C", str(ninja_file.parent), "-f", str(ninja_file), "-j", str(jobs)]
    env = os.environ | {"TMPDIR": str(scratch)}
    if "CC" not in env:
        env.setdefault("NVCC_CCBIN", tools.cxx)  # otherwise nvcc looks for gcc on PATH
    with log.open("wb") as out:
        ninja = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, pass_fds=(held,),
            process_group=0,
        )  # fmt: skip
    try:
        failed = _await(ninja)
    except KeyboardInterrupt:
        log.unlink()
        raise
    if failed:
        raise KernelError(_failure_reason(spec, log))
    return ninja_file.parent / f"{spec.name}.so"


def _await(ninja: subprocess.Popen[bytes]) -> int:
    """Return ninja's exit status. If a signal interrupts the wait, ninja ends first, with its compilers."""
    try:
        return ninja.wait()
    except BaseException:
        ninja.terminate()
        try:
            ninja.wait(_ENDING)
        except BaseException:  # a second signal, or a compiler that does not end
            ninja.kill()
            raise
        raise


def _failure_reason(spec: KernelSpec, log: Path) -> str:
    text = log.read_text(errors="replace")
    if _FULL in text or "Disk quota exceeded" in text:
        return _disk_full(log.parent)
    if re.search(r"\bKilled\b|signal 9", text):
        why = "the compiler was killed, probably because memory ran out; try `llumd kernels build --jobs 1`"
        return f"{spec.name}: {why} ({log})"
    if lacking := re.search(r"fatal error: (\S+): No such file", text):
        return (
            f"{spec.name}: neither the CUDA toolkit nor the C++ compiler has {lacking[1]}; "
            f"install the whole of both ({log})"
        )
    if too_new := re.search(r"unsupported (?:GNU|clang) version! (.*)", text):
        return f"{spec.name}: {too_new[1]} Install an older compiler, and name it: CXX=g++-14 for example ({log})"
    errors = [line for line in text.splitlines() if re.search(r"\berror\b", line)]
    first = f": {errors[0].strip()[:300]}" if errors else ""
    return f"{spec.name} does not compile{first}\nthe full output of the compiler is in {log}"


def install(name: str, library: Path, where: Path, scratch: Path, versions: dict[str, str]) -> int:
    """Move a library to its place under `where`, completely or not at all, and return its size in bytes.

    `scratch`: a directory on the same file system. `versions`: nvcc and tvm-ffi of the build. Raises OSError.
    """
    fresh = scratch / "fresh" / name
    fresh.mkdir(parents=True)
    shutil.copyfile(library, fresh / f"{name}.so")
    size = library.stat().st_size
    (fresh / RECORD).write_text(json.dumps({"size": size} | versions))
    for file in fresh.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(where / name, ignore_errors=True)
    fresh.rename(where / name)
    return size


def _disk_full(where: Path) -> str:
    free = shutil.disk_usage(where).free >> 20 if where.exists() else 0
    return f"the disk of {where} is full ({free} MiB free); make room, or set $LLUMD_KERNELS to another directory"
