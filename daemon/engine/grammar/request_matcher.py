"""The grammar of one request at its engine: which tokens may come next."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from daemon.engine.grammar.compiler import Compiler
from daemon.engine.request import Request
from daemon.models.grammar.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger(__name__)

Bits = NDArray[np.int32]
"""A mask: bit t % 32 of word t // 32 is set if token t may come next."""


class RequestMatcher:
    """The state of a request's grammar. It follows the request's tokens, so it can be built anywhere from them.

    `fill` runs in one thread at a time; the others read `bits` when it has returned.
    """

    __slots__ = (
        "_buffer",
        "_compiler",
        "_grammar",
        "_matcher",
        "_num_consumed",
        "_prompt_len",
        "_rid",
        "_shared",
        "_tokens",
        "bits",
        "failed",
        "position",
        "seconds",
    )

    def __init__(self, request: Request, compiler: Compiler) -> None:
        self._compiler = compiler
        self._rid = request.rid
        self._grammar = request.sampling.grammar
        self._tokens = request.tokens
        self._prompt_len = request.prompt_len
        self._matcher: LLMatcher | None = None
        self._shared = True
        self._num_consumed = 0
        self._buffer: Bits | None = None
        self.bits: Bits | None = None
        self.position = -1  # number of output tokens before the token that `bits` is for
        self.failed = False  # no token can be sampled any more
        self.seconds = 0.0  # CPU time of the latest `fill`

    @property
    def current(self) -> bool:
        """True if `bits` are those of the next token, or there are none any more."""
        return self.failed or self.position == len(self._tokens) - self._prompt_len

    def fill(self) -> None:
        """Compile the grammar if it is not, follow the request's new tokens, and compute the mask after them.

        What the grammars of a kind share may be used up by one of them. So if that fails, do it once more alone.
        """
        began = time.thread_time()
        try:
            if not self._try_fill() and self._shared:
                self._matcher, self._shared = self._compiler.unshared(self._grammar), False
                self._num_consumed = 0
                self._try_fill()
            self.failed = self._matcher is None or self._matcher.is_error()
            if self._matcher is not None and self.failed:
                log.warning("request %d cannot follow its grammar: %s", self._rid, self._matcher.get_error())
        except GrammarError as e:
            log.warning("request %d ends with an error: its grammar cannot be compiled: %s", self._rid, e)
            self.failed = True
        except Exception:
            log.exception("request %d ends with an error: its grammar failed", self._rid)
            self.failed = True
        self.seconds = time.thread_time() - began

    def _try_fill(self) -> bool:
        """Return False if the matcher cannot go on."""
        if self._matcher is None:
            self._matcher = self._compiler.matcher(self._grammar)
        output = self._tokens[self._prompt_len + self._num_consumed :]
        if output and not self._matcher.consume_tokens(output):
            return False
        self._num_consumed += len(output)
        if self._buffer is None:
            vocabulary = self._compiler.vocabulary
            self._buffer = np.zeros(vocabulary.num_buffer_words, np.int32)
            self.bits = self._buffer[: vocabulary.num_words]
        self._matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, self._buffer.nbytes)  # releases the GIL
        self.position = self._num_consumed
        return not self._matcher.is_error()
