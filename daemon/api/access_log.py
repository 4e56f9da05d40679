"""The access log: one line for each HTTP request. It never has text of a prompt or an answer."""

from __future__ import annotations

import logging

from aiohttp import web

from daemon.api.request_id import ANSWER_ID

log = logging.getLogger("daemon.api.access")

USAGE: web.RequestKey[tuple[int, int]] = web.RequestKey("usage", tuple)  # prompt tokens, output tokens
_MAX_PATH = 200  # characters


class AccessLog:
    """Writes the line at level `info` if the option `access_log` is set, otherwise at `debug`."""

    def __init__(self, always: bool) -> None:
        self._level = logging.INFO if always else logging.DEBUG

    def write(self, http: web.Request, status: int | None, seconds: float, request_id: str) -> None:
        """Write the line of a request. `status` None: the client has hung up."""
        if log.isEnabledFor(self._level):
            # The path as the client has sent it, without its query, which may be anything.
            request = f"{http.remote or '-'} {http.method} {http.rel_url.raw_path[:_MAX_PATH]}"
            self.write_line(request, status, seconds, request_id, http.get(ANSWER_ID) or "", http.get(USAGE))

    def write_line(
        self,
        request: str,
        status: int | None,
        seconds: float,
        request_id: str,
        answer_id: str,
        usage: tuple[int, int] | None,
    ) -> None:
        """Write the line of a request; `request` is its client, method and path."""
        ids = f"id {request_id}" if request_id else "no id"
        if answer_id and answer_id != request_id:
            ids += f", {answer_id}"
        if usage:
            ids += f", tokens {usage[0]}+{usage[1]}"
        word = "hung up" if status is None else str(status)
        log.log(self._level, "%s %s %.3f s, %s", request, word, seconds, ids)
