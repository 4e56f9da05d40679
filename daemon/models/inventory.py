"""The models on this machine: those of the hub's cache and those that llumd has converted. List them, remove them.

Only commands of the user import it: it uses huggingface_hub, which knows what its cache shares between models.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from daemon.models import store
from daemon.models.files import ModelError
from daemon.models.hub import cache
from daemon.models.hub.files import gguf_file
from daemon.models.hub.name import DEFAULT_REVISION, HubName, parse_name
from daemon.models.locks import is_in_use

HUB, CONVERTED = "hub", "converted"


class Entry(NamedTuple):
    """A model on this machine."""

    name: str  # as `llumd serve` takes it
    kind: str  # HUB, or CONVERTED by llumd
    revision: str  # the branch or tag of the hub that means this commit here, or ""
    commit: str
    size: int  # bytes on the disk; a file that two entries share counts in both
    last_used: float  # seconds since the epoch; 0: not known
    complete: bool
    in_use: bool  # a daemon serves it now
    path: str


def entries() -> list[Entry]:
    """Return all models, by name."""
    return sorted([*_hub_entries(_scan()), *_converted_entries()], key=lambda e: (e.name.lower(), -e.last_used))


def remove(text: str) -> int:
    """Remove a model. Return the bytes that are free now.

    `text`: a name or a path as `entries` has it. ORG/NAME alone removes all revisions and files of the repository,
    and what was converted from them. Raises ModelError.
    """
    found = [e for e in entries() if _matches(e, text)]
    if not found:
        raise ModelError(f"{text} is not among the models on this machine; `llumd models` lists them")
    if used := [e for e in found if e.in_use]:
        raise ModelError(f"a daemon serves {used[0].name} now; stop it before you remove the model")
    try:
        freed = _remove_from_hub([e for e in found if e.kind == HUB])
        return freed + sum(_remove_converted(Path(e.path), e.size) for e in found if e.kind == CONVERTED)
    except OSError as e:
        raise ModelError(f"cannot remove {text}: {e.strerror or e}: {e.filename}") from None


def _scan() -> HFCacheInfo | None:
    try:
        return scan_cache_dir(cache.hub_cache())
    except (CacheNotFound, ValueError):  # ValueError: it is a file
        return None


def _hub_entries(info: HFCacheInfo | None) -> Iterator[Entry]:
    pins = cache.pins()
    for repo in info.repos if info is not None else ():
        if repo.repo_type == "model":
            for commit in repo.revisions:
                mine = [p for p in pins if (p.repo, p.commit) == (repo.repo_id, commit.commit_hash)]
                yield from _entries_of_commit(repo, commit, mine)


def _entries_of_commit(
    repo: CachedRepoInfo, commit: CachedRevisionInfo, pins: Sequence[cache.Pin]
) -> Iterator[Entry]:
    """Yield an entry for each .gguf file, and one for the model directory if it is one."""
    revisions = sorted({p.revision for p in pins if not p.name.is_commit} | set(commit.refs))
    revision = DEFAULT_REVISION if DEFAULT_REVISION in revisions else next(iter(revisions), "")
    base = HubName(repo.repo_id, revision or commit.commit_hash)
    used = max([*map(cache.last_used, pins), 0.0]) or repo.last_accessed
    sizes = {str(f.file_path.relative_to(commit.snapshot_path)): f.size_on_disk for f in commit.files}
    ggufs = {n: size for n, size in sizes.items() if n.endswith(".gguf")}
    snapshot = commit.snapshot_path
    common = (HUB, revision, commit.commit_hash)
    for file, size in ggufs.items():
        yield Entry(str(base._replace(gguf=file)), *common, size, used, True, False, str(snapshot / file))
    if "config.json" in sizes or not ggufs:
        size = sum(sizes.values()) - sum(ggufs.values()) + _partial_bytes(repo.repo_path)
        complete = cache.is_complete(snapshot)
        yield Entry(str(base), *common, size, used, complete, is_in_use(snapshot), str(snapshot))


def _partial_bytes(repo: Path) -> int:
    return sum(file.stat().st_size for file in (repo / "blobs").glob("*.incomplete"))


def _converted_entries() -> Iterator[Entry]:
    for path in sorted(store.models_dir().glob("*/*")):
        if not (path / "config.json").is_file():
            continue
        size = sum(file.stat().st_size for file in path.iterdir() if not file.is_symlink())
        try:
            name = store.source_file(path).read_text()
        except OSError:  # an earlier version has converted it
            name = "demo" if path.name == store.DEMO_NAME else path.name
        used = 0.0
        with suppress(OSError):
            used = store.lock_file(path).stat().st_mtime
        yield Entry(name, CONVERTED, "", "", size, used, True, is_in_use(path), str(path))


def _matches(entry: Entry, text: str) -> bool:
    if text in (entry.name, entry.path) or (entry.kind == CONVERTED and text == Path(entry.path).name):
        return True
    if (path := store.local_path(text)) is not None:
        return str(path) in (entry.name, entry.path)
    name, wanted = parse_name(entry.name), parse_name(text)
    if name is None or wanted is None or name.repo != wanted.repo:
        return False
    if "@" in text and wanted.revision not in (name.revision, entry.revision, entry.commit):
        return False
    return not wanted.gguf or (bool(name.gguf) and _is_named(name, wanted.gguf))


def _is_named(name: HubName, wanted: str) -> bool:
    try:
        return bool(gguf_file(name.repo, [name.gguf], wanted))
    except ModelError:
        return False


def _remove_from_hub(found: Sequence[Entry]) -> int:
    """Remove files and whole commits from the cache of the hub, and what is recorded of them. Return the bytes."""
    info = _scan()
    if info is None or not found:
        return 0
    all_of = {e.commit: {o.path for o in _hub_entries(info) if o.commit == e.commit} for e in found}
    paths = {e.path for e in found}
    whole = [commit for commit, known in all_of.items() if known <= paths]
    freed = sum(_remove_file(info, Path(e.path), e.size) for e in found if e.commit not in whole)
    strategy = info.delete_revisions(*whole)
    strategy.execute()
    for pin in cache.pins():
        if cache.find(pin.name) is None and any(_matches(e, str(pin.name)) for e in found):
            cache.pin_file(pin.name).unlink(missing_ok=True)
    return freed + strategy.expected_freed_size


def _remove_file(info: HFCacheInfo, link: Path, size: int) -> int:
    """Remove one file of a commit, and its content if no other commit of the repository has it."""
    content = link.resolve()
    shared = [f for r in info.repos for c in r.revisions for f in c.files if f.blob_path == content]
    link.unlink()
    if len(shared) > 1:
        return 0
    content.unlink(missing_ok=True)
    return size


def _remove_converted(path: Path, size: int) -> int:
    shutil.rmtree(path)
    for file in (store.source_file(path), store.lock_file(path)):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # another model is there
        path.parent.rmdir()
    return size
