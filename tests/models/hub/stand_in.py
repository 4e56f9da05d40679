"""A hub on this machine: it answers the requests that huggingface_hub sends as the Hugging Face hub does.

Small files come from the hub itself, large ones by a redirect to another host (the CDN), where byte ranges work and
no token may arrive. A test can let connections break, change contents on their way, or take the network away.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model")
TOKEN = "hf_right"


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False  # its files need the token; what it has, everybody may see
    private: bool = False  # it does not exist without the token

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch, and return its id."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Hub:
    """The state of the server, and what it was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    tokens: set[tuple[str, str]] = field(default_factory=set)  # host ("hub" or "cdn"), Authorization
    begins: dict[str, list[int]] = field(default_factory=dict)  # by file, the first byte of each answer of the CDN
    break_after: list[int] = field(
        default_factory=list
    )  # for each answer of the CDN: bytes until the connection ends
    corrupt: dict[str, int] = field(default_factory=dict)  # file: number of answers with a wrong byte
    stall_after: int | None = None  # the CDN sends no more after these bytes
    status: int = 0  # answer everything with this status
    endpoint: str = ""
    cdn: str = ""

    def add(self, name: str, files: Path | dict[str, bytes], **options: Any) -> Repo:
        """Add a repository with one commit of these files, or of a directory."""
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in files.rglob("*") if f.is_file()}
        repo = self.repos[name] = Repo(**options)
        repo.commit(files)
        return repo

    def paths(self, method: str = "") -> list[str]:
        """Return the paths of all requests of a method."""
        return [path for m, path in self.requests if method in ("", m)]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a new hub on a free port."""
    hub = Hub()
    loop = asyncio.new_event_loop()
    runners: list[web.AppRunner] = []

    async def start() -> None:
        for routes, host in ((_hub_routes(hub), "127.0.0.1"), (_cdn_routes(hub), "127.0.0.2")):
            app = web.Application()
            app.add_routes(routes)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            runners.append(runner)
            site = web.TCPSite(runner, host, 0)
            await site.start()
            url = f"http://{host}:{runner.addresses[0][1]}"
            hub.cdn, hub.endpoint = (url, hub.endpoint) if host == "127.0.0.2" else (hub.cdn, url)

    async def stop() -> None:
        for runner in runners:
            await runner.cleanup()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def hub_of_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub, and let processes of this test use it, with caches in `tmp_path`."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LLUMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.response = web.json_response(
            {"error": message}, status=status, headers={"X-Error-Code": code, "X-Error-Message": message}
        )


def git_id(content: bytes) -> str:
    """Return the id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str) -> bool:
    """Return True if the hub keeps this file outside git."""
    return name.endswith(LFS_SUFFIXES)


def _hub_routes(hub: Hub) -> list[web.RouteDef]:
    def asked(http: web.Request) -> tuple[Repo, str, dict[str, bytes], bool]:
        hub.requests.append((http.method, http.path))
        authorization = http.headers.get("Authorization", "")
        if authorization:
            hub.tokens.add(("hub", authorization))
        if hub.status:
            raise _RefusedError(hub.status, "", "the hub is not well")
        if authorization and authorization != f"Bearer {TOKEN}":
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        repo = hub.repos.get(f"{http.match_info['org']}/{http.match_info['name']}")
        if repo is None or (repo.private and not authorization):
            raise _RefusedError(404 if authorization else 401, "RepoNotFound", "Repository not found")
        revision = http.match_info["revision"]
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit, repo.commits[commit], bool(authorization)

    async def info(http: web.Request) -> web.Response:
        _, commit, files, _ = asked(http)
        sizes = http.query.get("blobs", "").lower() == "true"
        siblings = [{"rfilename": n} | (_sizes(n, content) if sizes else {}) for n, content in files.items()]
        name = f"{http.match_info['org']}/{http.match_info['name']}"
        return web.json_response({"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings})

    async def tree(http: web.Request) -> web.Response:
        _, _, files, _ = asked(http)
        entries = []
        for name, content in files.items():
            sizes = _sizes(name, content)
            entry = {"type": "file", "path": name, "size": sizes["size"], "oid": sizes["blobId"]}
            if "lfs" in sizes:
                entry["lfs"] = {"oid": sizes["lfs"]["sha256"], "size": sizes["lfs"]["size"], "pointerSize": 134}
            entries.append(entry)
        return web.json_response(entries)

    async def resolve(http: web.Request) -> web.StreamResponse:
        repo, commit, files, has_token = asked(http)
        if repo.gated and not has_token:
            raise _RefusedError(401, "GatedRepo", "Access to model is restricted")
        name = http.match_info["file"]
        if name not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        content = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(name):
            sha = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha}"', "ETag": f'"{git_id(b"")}"'}
            where = f"{http.match_info['org']}/{http.match_info['name']}/{commit}/{name}"
            headers["Location"] = f"{hub.cdn}/repos/{where}?Signature=x"
            return web.Response(status=302, headers=headers)
        headers["ETag"] = f'"{git_id(content)}"'
        return web.Response(body=_on_its_way(hub, name, content), headers=headers)

    def guarded(handler: Any) -> Any:
        async def guard(http: web.Request) -> web.StreamResponse:
            try:
                return await handler(http)
            except _RefusedError as e:
                return e.response

        return guard

    repo = "/{org}/{name}"
    return [
        web.get("/api/models" + repo + "/revision/{revision:.+}", guarded(info)),
        web.get("/api/models" + repo + "/tree/{revision}", guarded(tree)),
        web.get(repo + "/resolve/{revision}/{file:.+}", guarded(resolve)),  # HEAD too
    ]


def _cdn_routes(hub: Hub) -> list[web.RouteDef]:
    async def get(http: web.Request) -> web.StreamResponse:
        hub.requests.append((http.method, "cdn:" + http.path))
        if "Authorization" in http.headers:
            hub.tokens.add(("cdn", http.headers["Authorization"]))
            return web.Response(status=400, text="Only one auth mechanism allowed")  # as S3 does
        _, org, name, commit, file = http.match_info["path"].split("/", 4)
        content = _on_its_way(hub, file, hub.repos[f"{org}/{name}"].commits[commit][file])
        begin = http.http_range.start or 0
        hub.begins.setdefault(file, []).append(begin)
        rest = content[begin:]
        headers = {"Content-Length": str(len(rest)), "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        response = web.StreamResponse(status=206 if begin else 200, headers=headers)
        await response.prepare(http)
        limit = hub.break_after.pop(0) if hub.break_after else hub.stall_after
        part = rest if limit is None else rest[:limit]
        await response.write(part)
        if len(part) < len(rest):
            if hub.stall_after is not None:
                await asyncio.sleep(60)
            assert http.transport is not None
            http.transport.close()
        return response

    return [web.get("/{path:repos/.+}", get)]


def _sizes(name: str, content: bytes) -> dict[str, Any]:
    out: dict[str, Any] = {"size": len(content), "blobId": git_id(content)}
    if is_lfs(name):
        out["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return out


def _on_its_way(hub: Hub, name: str, content: bytes) -> bytes:
    if hub.corrupt.get(name, 0) > 0:
        hub.corrupt[name] -= 1
        return content[:-1] + bytes([content[-1] ^ 1])
    return content
