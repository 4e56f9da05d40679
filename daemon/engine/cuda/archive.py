"""Archives of compiled kernels, of one or more architectures: a machine that takes one needs no compiler.

An archive is a tar file, compressed by xz or gzip. Its first member, `manifest.json`, names FlashInfer's version and
every library with its record and its SHA-256; then come the libraries, `<arch>/<name>.so`, and nothing else.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import msgspec

from daemon.engine.cuda import compile as compiler
from daemon.engine.cuda import kernels
from daemon.engine.cuda.kernels import KernelError

Progress = Callable[[str], None]

_FORMAT = 1
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 1 << 20
_LIBRARY_BYTES = 1 << 30
_SCRATCH = ".unpacking"
_BAD_DATA = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


class _Kernel(msgspec.Struct, forbid_unknown_fields=True):
    """A library of an archive."""

    arch: str
    name: str
    size: int  # bytes
    sha256: str
    nvcc: str
    tvm_ffi: str

    @property
    def member(self) -> str:
        return f"{self.arch}/{self.name}.so"


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What an archive holds."""

    format: int
    flashinfer: str
    kernels: list[_Kernel]


def pack(file: Path, archs: Collection[str], progress: Progress) -> int:
    """Write the compiled kernels of `archs` (empty: all) for the installed FlashInfer, and return their number.

    Kernels that this version of llumd does not use are left out. Equal kernels give an equal file. Raises
    KernelError.
    """
    compression = {".xz": "xz", ".gz": "gz", ".tgz": "gz"}.get(file.suffix)
    if compression is None:
        raise KernelError(f"{file}: the name of an archive ends in .tar.xz or .tar.gz")
    found = _usable_here(archs)
    manifest = _Manifest(_FORMAT, kernels.flashinfer_version(), [_describe(arch, built) for arch, built in found])
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        with (
            unfinished.open("wb") as raw,
            _compressed(raw, compression) as out,
            tarfile.open(fileobj=out, mode="w|") as tar,
        ):
            _add(tar, _MANIFEST, io.BytesIO(msgspec.json.format(msgspec.json.encode(manifest))))
            for kernel in manifest.kernels:
                progress(f"{kernel.member}, {kernel.size / 2**20:.1f} MiB")
                with _library(kernels.directory(kernel.arch), kernel.name).open("rb") as library:
                    _add(tar, kernel.member, library)
        unfinished.rename(file)
    except OSError as e:
        raise KernelError(f"cannot write {file}: {e.strerror or e}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return len(found)


def unpack(file: Path, progress: Progress) -> int:
    """Take the kernels of an archive that are not here yet, and return their number.

    The whole archive is checked before the first kernel is put in its place. Raises KernelError.
    """
    root = kernels.kernels_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with compiler.lock(root / ".lock", progress):
            scratch = root / _SCRATCH
            shutil.rmtree(scratch, ignore_errors=True)  # of an unpack that was killed
            scratch.mkdir()
            try:
                return _unpack(file, scratch, progress)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as e:
        raise KernelError(f"cannot store kernels in {root}: {e.strerror or e}") from None


def _usable_here(archs: Collection[str]) -> list[tuple[str, kernels.BuiltKernel]]:
    """Return the kernels to pack, each with its architecture."""
    prefix, names = f"{kernels.flashinfer_version()}-", kernels.known_names()
    found = []
    for where, modules in kernels.listing(kernels.kernels_dir()).items():
        arch = where.name.removeprefix(prefix)
        if where.name.startswith(prefix) and (arch in archs or not archs):
            found += [(arch, built) for built in modules if built.name in names]
    absent = sorted(set(archs) - {arch for arch, _ in found})
    if absent or not found:
        raise KernelError(
            f"no kernels for {', '.join(absent) or 'any architecture'} in {kernels.kernels_dir()}; "
            "`llumd kernels build` compiles them"
        )
    return found


def _library(where: Path, name: str) -> Path:
    return where / name / f"{name}.so"


def _describe(arch: str, built: kernels.BuiltKernel) -> _Kernel:
    with _library(kernels.directory(arch), built.name).open("rb") as library:
        digest = hashlib.file_digest(library, "sha256").hexdigest()
    return _Kernel(arch, built.name, built.size, digest, built.nvcc, built.tvm_ffi)


def _compressed(raw: IO[bytes], compression: str) -> Any:
    """Return a file that writes to `raw`. gzip stores neither the time nor the name of the file."""
    if compression == "xz":
        return lzma.LZMAFile(raw, "wb")
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0)


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size = content.seek(0, os.SEEK_END)
    content.seek(0)
    tar.addfile(member, content)


def _unpack(file: Path, scratch: Path, progress: Progress) -> int:
    try:
        with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            manifest = _read_manifest(file, tar)
            _extract(file, tar, {kernel.member: kernel for kernel in manifest.kernels}, scratch)
    except FileNotFoundError:
        raise KernelError(f"{file} does not exist") from None
    except _BAD_DATA as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = getattr(e, "strerror", None) or e
        raise KernelError(f"{file} cannot be read as an archive of kernels: {why}; fetch it again") from None
    return sum(_take(kernel, scratch, progress) for kernel in manifest.kernels)


def _read_manifest(file: Path, tar: tarfile.TarFile) -> _Manifest:
    """Return the manifest. Raises KernelError if it does not fit here."""
    first = tar.next()
    if first is None or first.name != _MANIFEST or not first.isreg() or first.size > _MANIFEST_BYTES:
        raise KernelError(f"{file} is not an archive of kernels: it does not begin with {_MANIFEST}")
    stream = tar.extractfile(first)
    content = stream.read() if stream else b""
    try:
        if (version := json.loads(content)["format"]) != _FORMAT:
            raise KernelError(f"{file} has format {version}, this llumd reads format {_FORMAT}")
        manifest = msgspec.json.decode(content, type=_Manifest)
    except (ValueError, KeyError, TypeError) as e:
        raise KernelError(f"{file}: its {_MANIFEST} is damaged ({e})") from None
    here = kernels.flashinfer_version()
    if manifest.flashinfer != here:
        raise KernelError(f"{file} has kernels of FlashInfer {manifest.flashinfer}, here FlashInfer is {here}")
    for kernel in manifest.kernels:
        _check_entry(file, kernel)
    if len({kernel.member for kernel in manifest.kernels}) != len(manifest.kernels):
        raise KernelError(f"{file}: its {_MANIFEST} names a kernel twice")
    return manifest


def _check_entry(file: Path, kernel: _Kernel) -> None:
    """Raise KernelError unless name and architecture are such, and no path to another place."""
    valid = re.fullmatch(r"\w+", kernel.name, re.ASCII) and kernels.parse_arch(kernel.arch) == kernel.arch
    if not valid or not 0 < kernel.size <= _LIBRARY_BYTES or not re.fullmatch(r"\d+\.\d+", kernel.nvcc):
        raise KernelError(f"{file}: its {_MANIFEST} has an entry that is no kernel: {kernel.member!r}")


def _extract(file: Path, tar: tarfile.TarFile, wanted: dict[str, _Kernel], scratch: Path) -> None:
    """Write every library to `<scratch>/<arch>/<name>.so`, checked. Raises KernelError."""
    left = dict(wanted)
    for member in tar:
        if member.name == _MANIFEST:
            continue
        kernel = left.pop(member.name, None)
        if kernel is None or not member.isreg():
            raise KernelError(f"{file} holds {member.name!r}, which its {_MANIFEST} does not list as a library")
        stream = tar.extractfile(member)
        assert stream is not None  # a regular file
        target = scratch / kernel.member
        target.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        with target.open("wb") as out:
            while data := stream.read(1 << 20):
                digest.update(data)
                out.write(data)
        if member.size != kernel.size or digest.hexdigest() != kernel.sha256:
            raise KernelError(f"{file}: {member.name} is damaged: its SHA-256 is not the one in {_MANIFEST}")
    if left:
        raise KernelError(f"{file} is not complete: it has no {next(iter(left))}")


def _take(kernel: _Kernel, scratch: Path, progress: Progress) -> bool:
    """Put one checked library in its place. Return False if it is there already."""
    where = kernels.directory(kernel.arch)
    where.mkdir(exist_ok=True)
    with compiler.lock(where / ".lock", progress):
        if kernels.find(where, kernel.name):
            progress(f"{kernel.member} is already there")
            return False
        versions = {"nvcc": kernel.nvcc, "tvm_ffi": kernel.tvm_ffi}
        compiler.install(kernel.name, scratch / kernel.member, where, scratch, versions)
    progress(f"{kernel.member}, {kernel.size / 2**20:.1f} MiB")
    return True
