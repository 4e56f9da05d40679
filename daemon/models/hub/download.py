"""Download of a model from the hub, in a process of its own: `python -m daemon.models.hub.download JSON`.

It is the only code that reaches the hub. It writes one JSON object a line to standard output: {"progress": text}, and
at the end {"result": ...} or {"error": text}. Files go to the cache that all tools share (`HF_HUB_CACHE`), in its
layout: content in `blobs/<digest>`, links to it in `snapshots/<commit>/<file>`, and commits in `refs/<branch>`.

huggingface_hub asks the hub and keeps the cache. Three things are ours, as it lacks them: a download that was killed
goes on where it stopped, the content is checked against its digest, and the disk is known to have room before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them lazily
    build_hf_headers,
    disable_progress_bars,
)

from daemon import __version__
from daemon.models.files import ModelError, gigabytes, read_json
from daemon.models.hub import files
from daemon.models.hub.errors import explain, is_temporary
from daemon.models.hub.files import RemoteFile
from daemon.models.hub.name import HubName

_WORKERS = 4  # files at the same time; more do not help, and a shared line stays usable
_ATTEMPTS = 4  # in a row that bring no byte
_LARGEST_GET = 50 * 10**9  # bytes; the hub serves larger files by its chunk protocol only
_RESERVE = 64 << 20  # bytes that stay free on the disk
_TICK = 0.25  # seconds
_LINE_PERIODS = (5.0, 60.0)  # seconds between two lines of progress: if there is some, and in any case
_LINE_STEP = 0.05  # of the whole: enough for a line
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

Report = Callable[[str], None]


class Download:
    """The download of one model at one commit."""

    def __init__(self, name: HubName, report: Report) -> None:
        """Ask the hub for the commit and its files. Raises the errors of huggingface_hub."""
        self._api = HfApi(library_name="llumd", library_version=__version__)
        info = self._api.model_info(name.repo, revision=name.revision, files_metadata=True)
        self._name = name
        self._report = report
        self.commit = _checked_digest(info.sha)
        self.listing = {s.rfilename: _remote_file(s) for s in info.siblings or []}
        self._storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")
        self.snapshot = self._storage / "snapshots" / self.commit
        self._blobs = self._storage / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the files that the cache does not have at this commit."""
        return [n for n in names if not (self.snapshot / n).exists()]

    def fetch(self, names: Sequence[str]) -> None:
        """Bring these files into the cache. Raises ModelError, OSError and the errors of huggingface_hub."""
        names = sorted(self.missing(names), key=lambda n: -self.listing[n].size)
        self._check_space(names)
        pool = ThreadPoolExecutor(_WORKERS)
        futures = [pool.submit(self._fetch_file, name) for name in names]
        line = _ProgressLine(sum(self.listing[n].size for n in names), self._report)
        pending: set[Future[None]] = set(futures)
        while pending:
            _, pending = wait(pending, _TICK, FIRST_EXCEPTION)
            if any(f.done() and f.exception() for f in futures):
                break
            line.update(sum(self._present(self.listing[n]) for n in names))
        for future in futures:
            if future.done():
                future.result()

    def keep_revision(self) -> None:
        """Write the commit of the branch or tag where other tools look for it."""
        if not self._name.is_commit:
            ref = self._storage / "refs" / self._name.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.{os.getpid()}.new")
            new.write_text(self.commit)
            new.replace(ref)

    def bytes_to_fetch(self, names: Sequence[str]) -> int:
        """Return the bytes that are still to come for these files."""
        return sum(self.listing[n].size - self._present(self.listing[n]) for n in self.missing(names))

    def _check_space(self, names: Sequence[str]) -> None:
        needed, free = self.bytes_to_fetch(names), shutil.disk_usage(self._blobs).free
        if needed and needed + _RESERVE > free:
            raise ModelError(
                f"{self._name} needs {gigabytes(needed)} more in {constants.HF_HUB_CACHE}, which has "
                f"{gigabytes(free)} free; free some space (`llumd models` lists what is there), or set HF_HOME to "
                "another directory"
            )

    def _present(self, file: RemoteFile) -> int:
        for path in (self._blobs / file.digest, self._partial(file)):
            try:
                return min(path.stat().st_size, file.size) if file.digest else 0
            except OSError:
                pass
        return 0

    def _partial(self, file: RemoteFile) -> Path:
        return self._blobs / f"{file.digest}.llumd.incomplete"

    def _fetch_file(self, name: str) -> None:
        file = self.listing[name]
        if file.digest and file.size < _LARGEST_GET and not (self._blobs / file.digest).exists():
            partial = self._partial(file)
            if not self._is_complete(name, partial):
                # A part that an earlier download left can be damaged, for example by a power failure.
                self._report(f"{name} has the wrong content; downloading it again")
                if not self._is_complete(name, partial):
                    raise ModelError(
                        f"{name} of {self._name} has the wrong {'SHA-256' if file.is_lfs else 'checksum'} after the "
                        f"download from {constants.ENDPOINT}, twice: a proxy or a mirror may have changed it; try "
                        "again, or set HF_ENDPOINT to another hub"
                    )
            partial.replace(self._blobs / file.digest)
        # The content is there, so this only makes the link. It downloads what has no known digest.
        self._api.hf_hub_download(self._name.repo, name, revision=self.commit)

    def _is_complete(self, name: str, partial: Path) -> bool:
        """Download the rest of a file. Return False, and remove it, if its content is not what it should be."""
        file = self.listing[name]
        self._transfer(name, partial, file.size)
        with partial.open("rb") as f:
            os.fsync(f.fileno())
            if file.is_lfs:
                right = hashlib.file_digest(f, "sha256").hexdigest() == file.digest
            else:
                right = hashlib.sha1(b"blob %d\0" % file.size + f.read()).hexdigest() == file.digest  # as git does
        if not right:
            partial.unlink()
        return right

    def _transfer(self, name: str, partial: Path, size: int) -> None:
        url = hf_hub_url(self._name.repo, name, revision=self.commit)
        headers = build_hf_headers(library_name="llumd", library_version=__version__)  # with the token
        attempt = 0
        with partial.open("ab") as f:
            if f.tell() > size:
                f.truncate(0)
            while True:
                before = f.seek(0, os.SEEK_END)
                try:
                    # Each attempt asks the hub, not the host that it redirects to: such an address expires.
                    http_get(url, f, resume_size=before, headers=headers, expected_size=size)
                    return
                except Exception as e:
                    f.flush()
                    attempt = 0 if f.seek(0, os.SEEK_END) > before else attempt + 1
                    if not is_temporary(e) or attempt == _ATTEMPTS:
                        raise
                    time.sleep(attempt)


class _ProgressLine:
    """A line of progress now and then."""

    def __init__(self, total: int, report: Report) -> None:
        self._total = total
        self._report = report
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._said_bytes = 0

    def update(self, present: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = self._said_bytes = present
        often, seldom = (self._said + period for period in _LINE_PERIODS)
        step = present - self._said_bytes >= self._total * _LINE_STEP
        if now < often or (now < seldom and not step) or not self._total:
            return
        rate = (present - self._first) / (now - self._began)
        left = f", {_minutes((self._total - present) / rate)} left" if rate > 0 else ""
        share = 100 * present // self._total
        self._report(
            f"downloaded {gigabytes(present)} of {gigabytes(self._total)} ({share} %), {rate / 1e6:.1f} MB/s{left}"
        )
        self._said, self._said_bytes = now, present


def download(name: HubName, *, weights: bool, report: Report) -> dict[str, Any]:
    """Download what `name` needs; without `weights` only what tells what it is. Return the commit and the files."""
    task = Download(name, report)
    if name.gguf:
        needed = [files.gguf_file(name.repo, task.listing, name.gguf)]
    else:
        files.check_is_model(name.repo, task.listing)
        needed = files.small_files(task.listing)
        task.fetch(needed)
        index = read_json(task.snapshot / files.INDEX) if files.INDEX in task.listing else None
        _check_can_serve(name, task.snapshot)
        needed += files.weight_files(name.repo, task.listing, index)
    if weights or name.gguf:
        _announce(name, task, needed, report)
        task.fetch(needed)
    task.keep_revision()
    sizes = {n: task.listing[n].size for n in needed}
    return {"commit": task.commit, "files": sizes, "missing": task.bytes_to_fetch(needed)}


def _announce(name: HubName, task: Download, needed: Sequence[str], report: Report) -> None:
    if missing := task.missing(needed):
        size = sum(task.listing[n].size for n in missing)
        here = size - task.bytes_to_fetch(needed)
        again = f"; {gigabytes(here)} of it are there from an earlier download" if here else ""
        report(
            f"downloading {name} (commit {task.commit[:12]}, {gigabytes(size)}) to {constants.HF_HUB_CACHE}{again}"
        )


def _check_can_serve(name: HubName, snapshot: Path) -> None:
    """Refuse before the weights come what llumd cannot compute."""
    from daemon.models.model_config import read_model_config

    try:
        read_model_config(snapshot, str(name))
    except ModelError as e:
        raise ModelError(str(e).replace(f"{snapshot}/", f"{name}: ")) from None


def _remote_file(sibling: Any) -> RemoteFile:
    if sibling.lfs is not None:
        return RemoteFile(sibling.lfs.size, _checked_digest(sibling.lfs.sha256), True)
    # Some mirrors tell neither; then huggingface_hub downloads the file by itself.
    return RemoteFile(sibling.size or 0, _checked_digest(sibling.blob_id) if sibling.blob_id else "", False)


def _checked_digest(text: Any) -> str:
    """Return a digest that a hub has sent. It becomes the name of a file, so it must be nothing else."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ModelError(f"{constants.ENDPOINT} does not answer as a Hugging Face hub does; check HF_ENDPOINT")
    return text


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _emit(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class _Warnings(logging.Handler):
    """Warnings of huggingface_hub, for example of a connection that broke, as lines of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        _emit({"progress": ". ".join(record.getMessage().splitlines())})


def _main() -> int:
    arguments = json.loads(sys.argv[1])
    name = HubName(*arguments["name"])
    disable_progress_bars()
    library = logging.getLogger("huggingface_hub")
    library.handlers = [_Warnings(logging.WARNING)]
    library.propagate = False
    try:
        result = download(name, weights=arguments["weights"], report=lambda text: _emit({"progress": text}))
    except BrokenPipeError:  # the process that wanted the model is gone
        return 1
    except Exception as e:
        _emit({"error": explain(e, name), "temporary": is_temporary(e)})
        return 1
    _emit({"result": result})
    return 0


if __name__ == "__main__":
    os._exit(_main())  # threads may still wait for the network
