"""Other spellings of this server's paths, for clients that put a path together in their own way.

Clients add a path to a base URL that a user types: with or without ``/v1`` and a slash at its end. Anthropic's
clients add ``/v1`` themselves, and Azure's name the model in the path. All of these find the route that is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from aiohttp.web_urldispatcher import AbstractResource, UrlMappingMatchInfo
from yarl import URL

DEPLOYMENT = "deployment"  # in the match of a route: the model that the path names
_TRIED: web.RequestKey[bool] = web.RequestKey("tried", bool)  # of a copy of a request: its path is a candidate
_AZURE = ("openai", "deployments")


def candidates(path: str, tails: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the paths that `path` may mean, and the model that it names or "". Pure.

    Paths are as they are sent, with percent encoding. `tails`: the ends of paths that may follow the name of a model,
    which may contain slashes, the longest first.
    """
    parts = [part for part in path.split("/") if part]
    model = ""
    if tuple(parts[:2]) == _AZURE:
        rest = "/".join(parts[2:])
        tail = next((tail for tail in tails if rest.endswith("/" + tail)), None)
        if tail is None:
            return
        model, parts = unquote(rest.removesuffix("/" + tail)), tail.split("/")
    elif parts[:1] == ["openai"]:
        del parts[0]
    while parts[:1] == ["v1"]:
        del parts[0]
    if parts:
        yield "/v1/" + "/".join(parts), model
        if not model:
            yield "/" + "/".join(parts), model


class OtherSpellings(AbstractResource):
    """Finds the routes of a router under other spellings of their paths. Register it last, at the root."""

    def __init__(self, router: web.UrlDispatcher, tails: Iterable[str]) -> None:
        """`tails`: the ends of paths, behind ``/v1/``, that may follow the name of a model."""
        super().__init__()
        self._router = router
        self._tails = sorted(tails, key=len, reverse=True)

    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        """Return the match of another spelling, or None and the methods that it allows."""
        sent = request.rel_url.raw_path
        allowed: set[str] = set()
        if _TRIED in request:
            return None, allowed
        for path, model in candidates(sent, self._tails):
            if path == sent:
                continue
            attempt = request.clone(rel_url=request.rel_url.with_path(path, encoded=True))
            attempt[_TRIED] = True
            match = await self._router.resolve(attempt)
            if match.http_exception is None:
                if model:
                    match[DEPLOYMENT] = model
                return match, allowed
            if isinstance(match.http_exception, web.HTTPMethodNotAllowed):
                allowed |= match.http_exception.allowed_methods
        return None, allowed

    @property
    def canonical(self) -> str:
        return "/"

    def raw_match(self, path: str) -> bool:
        return False

    def get_info(self) -> Any:
        return {"path": self.canonical}

    def url_for(self, **_: str) -> URL:
        raise NotImplementedError("no URL is built from it")

    def add_prefix(self, prefix: str) -> None:
        raise NotImplementedError("this server has no sub-applications")

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())
