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
        if not log.isEnabledFor(self._level):
            return
        # The path as the client has sent it, without its query, which may be anything.
        path = http.rel_url.raw_path[:_MAX_PATH]
        ids = f"id {request_id}" if request_id else "no id"
        if (answer := http.get(ANSWER_ID)) and answer != request_id:
            ids += f", {answer}"
        if usage := http.get(USAGE):
            ids += f", tokens {usage[0]}+{usage[1]}"
        word = "hung up" if status is None else str(status)
        log.log(self._level, "%s %s %s %s %.3f s, %s", http.remote or "-", http.method, path, word, seconds, ids)
