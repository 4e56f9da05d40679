"""API keys at run time: the supervisor publishes them for all frontends, and reads the key file again when asked.

SIGHUP and the coordinator (for `llumctl reload`) ask in different ways; both end in `poll`, on the supervisor's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from daemon.config import ConfigError
from daemon.ipc.keys_page import Key, KeysOutcome, KeysWriter

log = logging.getLogger(__name__)


class KeySource(NamedTuple):
    """The keys at the start, and how to read them again."""

    keys: Sequence[Key]
    read: Callable[[], Sequence[Key]]  # raises ConfigError, with a message that repeats no key


class KeyReload:
    """Publishes the accepted keys. A file that cannot be used changes nothing: the former keys stay accepted."""

    def __init__(self, page: memoryview, source: KeySource | None) -> None:
        """`source`: None if clients need no key."""
        self._page = KeysWriter(page)
        self._source = source
        self._keys: dict[bytes, Key] = {}
        self._answered = self._page.requested
        self._signalled = False
        if source is not None:
            self._publish(source.keys, self._answered)

    def request(self) -> None:
        """Ask for a reload at the next `poll`. A signal handler may call it at any moment."""
        self._signalled = True

    def poll(self) -> None:
        """Read the key file again if a process or a signal has asked for it."""
        requested = self._page.requested  # before the file is read: a request during it counts for the next time
        if requested != self._answered or self._signalled:
            self._signalled, self._answered = False, requested
            self._reload(requested)

    def _reload(self, request: int) -> None:
        if self._source is None:
            log.info("nothing to read again: api_key_file is not set, and all other settings are read at start only")
            return
        try:
            keys = self._source.read()
        except ConfigError as e:
            log.error("%s; the %d former keys stay accepted", e, len(self._keys))
            self._page.report(KeysOutcome(request, len(self._keys), self._num_tenants(), error=str(e)))
            return
        outcome = self._publish(keys, request)
        log.info(
            "api_key_file was read again; accepted keys: %d (%d added, %d removed, %d changed); named tenants: %d",
            outcome.keys,
            outcome.added,
            outcome.removed,
            outcome.changed,
            outcome.tenants,
        )

    def _publish(self, keys: Sequence[Key], request: int) -> KeysOutcome:
        before, self._keys = self._keys, {key.digest: key for key in keys}
        kept = before.keys() & self._keys.keys()
        outcome = KeysOutcome(
            request,
            len(self._keys),
            self._num_tenants(),
            added=len(self._keys) - len(kept),
            removed=len(before) - len(kept),
            changed=sum(before[digest] != self._keys[digest] for digest in kept),
        )
        if before != self._keys:
            self._page.publish(keys)
        self._page.report(outcome)
        return outcome

    def _num_tenants(self) -> int:
        return len({key.tenant for key in self._keys.values()} - {""})
