"""Models of the hub on this machine: where they are, and which commit a name means here.

The first use of a name resolves its branch to a commit and records it. From then on the name means this commit,
without a network, until `llumd pull` records a newer one. So all processes and all later starts use the same files,
also when other tools update the cache that they share. The daemon uses this module, so it does not import
huggingface_hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from daemon.directories import cache_dir
from daemon.models.files import ModelError, read_json
from daemon.models.hub import files
from daemon.models.hub.name import HubName
from daemon.models.locks import exclusive
from daemon.models.module_process import start_module

Progress = Callable[[str], None]

_TRUE = {"1", "ON", "YES", "TRUE"}


class Pin(msgspec.Struct, frozen=True):
    """The commit that a name means on this machine, and the files of the model with their sizes in bytes."""

    repo: str
    revision: str
    gguf: str
    commit: str
    files: dict[str, int]

    @property
    def name(self) -> HubName:
        """The name that the user has given."""
        return HubName(self.repo, self.revision, self.gguf)


class _HubAwayError(ModelError):
    """The hub cannot be asked now."""


class Fetched(NamedTuple):
    """A model in the cache: a directory or a .gguf file. `missing`: bytes of weights that were not downloaded."""

    path: Path
    commit: str
    missing: int = 0


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the cache that all tools share: $HF_HUB_CACHE, or `hub` in $HF_HOME. See `hub_home`."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return _expanded(environ[name])
    return hub_home(environ) / "hub"


def hub_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return $HF_HOME, or `huggingface` in $CACHE_DIRECTORY (systemd), $XDG_CACHE_HOME or ~/.cache: the first set.

    A service of systemd often has no home directory that it may write to, so its own cache directory goes first.
    """
    if environ.get("HF_HOME"):
        return _expanded(environ["HF_HOME"])
    base = environ.get("CACHE_DIRECTORY") or environ.get("XDG_CACHE_HOME")
    return (_expanded(base) if base else Path.home() / ".cache") / "huggingface"


def find(name: HubName) -> Fetched | None:
    """Return the model if all its files are here, at the recorded commit."""
    pin = read_pin(name)
    if pin is None:
        return None
    directory = snapshot(name, pin.commit)
    if all(_has_size(directory / file, size) for file, size in pin.files.items()):
        return Fetched(_model_path(name, directory, pin.files), pin.commit)
    return None


def fetch(name: HubName, progress: Progress, *, weights: bool = True, update: bool = False) -> Fetched:
    """Return the model, from the cache if it is complete there, otherwise from the hub.

    `update`: ask the hub for the newest commit in any case. Without `weights` they may be missing. Raises ModelError.
    """
    if not update and (found := find(name)) is not None:
        return found
    lock = pin_file(name).with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock, lambda: progress(f"waiting for another process that downloads {name}")):
            if not update and (found := find(name)) is not None:
                return found
            return _fetch(name, progress, weights, update)
    except OSError as e:
        raise ModelError(
            f"cannot write to {lock.parent}: {e.strerror or e}; set $LLUMD_CACHE to another directory"
        ) from None


def _fetch(name: HubName, progress: Progress, weights: bool, update: bool) -> Fetched:
    pin, left = (None, None) if update else (read_pin(name), _left_by_others(name))
    # The hub is asked for the commit that is here already: only a pull moves a name to a newer one.
    commit = pin.commit if pin is not None else left.commit if left is not None else ""
    try:
        result = _download(name._replace(revision=commit) if commit else name, name, progress, weights)
    except _HubAwayError as e:
        if left is None:
            raise
        progress(f"{e}. Using commit {left.commit[:12]}, which another tool has downloaded")
        _write_pin(left)
        return Fetched(_model_path(name, snapshot(name, left.commit), left.files), left.commit)
    new = Pin(name.repo, name.revision, name.gguf, result["commit"], result["files"])
    if not result["missing"]:
        _write_pin(new)
    return Fetched(_model_path(name, snapshot(name, new.commit), new.files), new.commit, result["missing"])


def pins() -> list[Pin]:
    """Return everything that is recorded."""
    found = (_decode(file) for file in sorted(_pins_dir().glob("*.json")))
    return [pin for pin in found if pin is not None]


def last_used(pin: Pin) -> float:
    """Return when the model was last started or pulled, in seconds since the epoch."""
    try:
        return pin_file(pin.name).stat().st_mtime
    except OSError:
        return 0.0


def touch(name: HubName) -> None:
    """Note that the model is used now."""
    with contextlib.suppress(OSError):  # it is shown to users only
        os.utime(pin_file(name))


def read_pin(name: HubName) -> Pin | None:
    """Return what is recorded for the name; None if nothing is, or nothing that can be read."""
    return _decode(pin_file(name))


def pin_file(name: HubName) -> Path:
    """Return the file of the record."""
    return _pins_dir() / f"{quote(str(name), safe='')}.json"


def _pins_dir() -> Path:
    return cache_dir() / "hub"


def _decode(file: Path) -> Pin | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Pin)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_pin(pin: Pin) -> None:
    file = pin_file(pin.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(pin), indent=1))
    new.replace(file)


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser().absolute()


def repo_dir(repo: str) -> Path:
    """Return the directory of a repository in the cache of the hub."""
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def snapshot(name: HubName, commit: str) -> Path:
    """Return the directory of a repository's files at a commit."""
    return repo_dir(name.repo) / "snapshots" / commit


def _model_path(name: HubName, snapshot: Path, names: Mapping[str, int] | None = None) -> Path:
    if not name.gguf:
        return snapshot
    listed = names if names is not None else [str(f.relative_to(snapshot)) for f in snapshot.rglob("*.gguf")]
    return snapshot / files.gguf_file(name.repo, listed, name.gguf)


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def _left_by_others(name: HubName) -> Pin | None:
    """Return the model as other tools have downloaded it, if no file of its weights is missing.

    They may have left out small files, so the hub is asked for those if it can be reached.
    """
    try:
        commit = (
            name.revision if name.is_commit else (repo_dir(name.repo) / "refs" / name.revision).read_text().strip()
        )
        directory = snapshot(name, commit)
        if name.gguf:
            names = [str(_model_path(name, directory).relative_to(directory))]
        else:
            names = list(_complete_files(directory))
        sizes = {n: (directory / n).stat().st_size for n in names}
    except (OSError, ModelError):
        return None
    return Pin(name.repo, name.revision, name.gguf, commit, sizes) if sizes else None


def is_complete(snapshot: Path) -> bool:
    """Return True if no file of this model directory is missing."""
    try:
        return any(_complete_files(snapshot))
    except ModelError:
        return False


def _complete_files(snapshot: Path) -> Iterator[str]:
    """Yield the files of a model directory if none is missing, otherwise nothing."""
    names = [str(f.relative_to(snapshot)) for f in snapshot.rglob("*") if f.is_file()]
    listing = {n: files.RemoteFile(0, "", False) for n in names}
    needed = files.small_files(listing)
    if "config.json" not in needed or not any(n.startswith("tokenizer.") for n in needed):
        return
    yield from [*needed, *files.weight_files("", listing, read_json(snapshot / files.INDEX))]


def _download(asked: HubName, name: HubName, progress: Progress, weights: bool) -> dict[str, Any]:
    """Run the download in another process: the daemon needs neither its memory nor its threads. Raises ModelError."""
    if any(os.environ.get(n, "").upper() in _TRUE for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise _HubAwayError(
            f"{name} is not complete in {hub_cache()}, and HF_HUB_OFFLINE forbids to download it; run "
            f"`llumd pull {name}` without it"
        )
    environ = os.environ | {"HF_HOME": str(hub_home()), "HF_HUB_CACHE": str(hub_cache())}
    order = json.dumps({"name": asked, "weights": weights})
    with start_module("daemon.models.hub.download", order, environ) as process:
        try:
            last = _follow(process, progress)
            _, err = process.communicate()
        finally:
            process.terminate()  # no effect once it has ended
    if "result" in last:
        return dict(last["result"])
    why = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    raise (_HubAwayError if last.get("temporary") else ModelError)(
        last.get("error") or f"cannot download {name}: {why}"
    )


def _follow(process: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    """Pass on the lines of progress, and return the last message."""
    last: dict[str, Any] = {}
    for line in process.stdout or ():
        try:
            last = json.loads(line)
        except ValueError:
            continue
        if "progress" in last:
            progress(last["progress"])
    return last
