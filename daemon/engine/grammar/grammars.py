"""The grammars of all requests of one engine: compiled and filled in threads, beside the steps.

A request whose mask takes long must not hold up the others. So it is not planned before its grammar is compiled and
its first mask is there. A step waits for its masks only a little longer than it takes itself: the row of a mask that
is late counts as not computed, and its request is not planned before the mask is there. After a mask that has taken
long, the next ones are computed before their rows are planned.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from daemon.engine.grammar.compiler import Compiler
from daemon.engine.grammar.request_matcher import Bits, RequestMatcher
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, NOT_ONE, NOT_YET, StepPlan
from daemon.models.grammar.vocabulary import Vocabulary

SLOW = 0.002  # seconds of CPU time; after a mask that takes longer, the next one is computed before it is needed
_GRACE = 0.003  # seconds that a step waits for its masks
_GRACE_SHARE = 0.1  # the same, as a share of the step's own time
_COMPILERS = 4  # threads
_NICE = 10  # of these threads: the steps go first


class _Filling(NamedTuple):
    matcher: RequestMatcher
    future: Future[None]


class StepMasks:
    """The masks of the rows of one step that have a grammar. They are filled while the step is computed."""

    def __init__(self, rows: dict[Request, _Filling]) -> None:
        self.late: list[Request] = []
        self._rows = rows
        self._began = time.monotonic()
        self._deadline = 0.0

    def of(self, request: Request) -> Bits | int:
        """Return the request's mask; NO_TOKEN if there is none, NOT_YET if it is late, NOT_ONE if it is empty.

        The first call waits for all masks, and must come after the step's own work.
        """
        found = self._rows.get(request)
        if found is None:
            return NO_TOKEN
        if not self._deadline:
            now = time.monotonic()
            self._deadline = now + max(_GRACE, _GRACE_SHARE * (now - self._began))
        if not found.future.done():
            wait_for([found.future], max(0.0, self._deadline - time.monotonic()))
        if not found.future.done():
            self.late.append(request)
            return NOT_YET
        bits = found.matcher.bits
        if found.matcher.failed or bits is None:
            return NO_TOKEN
        return bits if bits.any() else NOT_ONE

    def wait(self, seconds: float) -> bool:
        """See `TokenMasks`."""
        _, late = wait_for([row.future for row in self._rows.values()], seconds)
        return not late

    def filling(self, request: Request) -> Future[None]:
        """Return what ends with the fill of the request's mask."""
        return self._rows[request].future


class Grammars:
    """Follows the grammars of requests. All methods are called from the worker's loop.

    `load` builds the vocabulary at the first grammar; `threads` compute masks. `wake` is called from any thread when
    `poll` has something to do.
    """

    def __init__(self, load: Callable[[], Vocabulary], *, threads: int = 1, wake: Callable[[], None]) -> None:
        self._compiler = Compiler(load)
        self._wake = wake
        self._matchers: WeakKeyDictionary[Request, RequestMatcher] = WeakKeyDictionary()
        self._ready: deque[Request] = deque()
        self._fillers = ThreadPoolExecutor(threads, "masks")
        self._compilers = ThreadPoolExecutor(_COMPILERS, "grammars", initializer=_be_nice)

    def warm_up(self) -> None:
        """Build the vocabulary now, in a thread."""
        self._compilers.submit(lambda: self._compiler.vocabulary)

    def prepare(self, grammar: str) -> None:
        """Compile a grammar whose request is about to arrive."""
        self._compilers.submit(self._compiler.matcher, grammar)

    def watch(self, request: Request) -> None:
        """Compile the grammar of a new request. It is not ready before `poll` says so."""
        matcher = self._matchers[request] = RequestMatcher(request, self._compiler)
        self._fill_ahead(request, matcher)

    def poll(self) -> None:
        """Let the requests be planned whose masks have been computed since the last call."""
        while self._ready:
            self._ready.popleft().unready = False

    def begin(self, plan: StepPlan) -> None:
        """Begin to fill the masks of the plan's rows. Call it just before the step is launched."""
        rows = [row.request for row in plan.rows if row.sample and row.request.sampling.grammar]
        if rows:
            plan.masks = StepMasks({request: self._begin(request) for request in rows})

    def _begin(self, request: Request) -> _Filling:
        matcher = self._matchers.get(request)
        if matcher is None:
            matcher = self._matchers[request] = RequestMatcher(request, self._compiler)
        if not matcher.current:
            return _Filling(matcher, self._fillers.submit(matcher.fill))
        filled: Future[None] = Future()
        filled.set_result(None)
        return _Filling(matcher, filled)

    def after_step(self, plan: StepPlan) -> None:
        """Handle the end of a step: its tokens are known."""
        masks = plan.masks
        if not isinstance(masks, StepMasks):
            return
        for request in masks.late:
            request.unready = True
            masks.filling(request).add_done_callback(partial(self._on_filled, request))
        self._fill_slow(row.request for row in plan.rows if row.sample and not row.request.unready)

    def _fill_slow(self, requests: Iterable[Request]) -> None:
        for request in requests:
            matcher = self._matchers.get(request)
            if matcher is not None and matcher.seconds > SLOW and not (request.finish or matcher.current):
                self._fill_ahead(request, matcher)

    def _fill_ahead(self, request: Request, matcher: RequestMatcher) -> None:
        request.unready = True
        self._compilers.submit(matcher.fill).add_done_callback(partial(self._on_filled, request))

    def _on_filled(self, request: Request, _: Future[None]) -> None:
        self._ready.append(request)
        self._wake()


def _be_nice() -> None:
    """Let the threads of the steps go before this one."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
