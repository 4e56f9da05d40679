"""The order to read the key file again. The supervisor carries it out, because it alone publishes keys."""

from __future__ import annotations

import asyncio

from daemon.control.refusal import Refusal
from daemon.ipc.fabric import Fabric
from daemon.ipc.keys_page import KeysOutcome, KeysRequester

_PERIOD = 0.02  # seconds between two looks for the outcome
_TIMEOUT = 8.0  # seconds; the supervisor looks for requests every fifth of a second


class KeyOrder:
    """Asks the supervisor to read the key file again and waits for the outcome."""

    def __init__(self, fabric: Fabric, timeout: float = _TIMEOUT) -> None:
        self._page = KeysRequester(fabric.keys_page())
        self._timeout = timeout

    async def reload(self) -> KeysOutcome:
        """Return how the reload ended. From then on every frontend accepts the keys of the file, if it has no error.

        Raises Refusal if the daemon has no key file or the supervisor does not answer, as while it stops.
        """
        if self._page.outcome() is None:
            raise Refusal("api_key_file is not set, so there is nothing to read again; other settings need a restart")
        number = self._page.request()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout
        while loop.time() < end:
            outcome = self._page.outcome()
            if outcome is not None and outcome.request >= number:
                return outcome
            await asyncio.sleep(_PERIOD)
        raise Refusal("the supervisor does not answer: it is stopping or hangs; the keys may not have changed")
