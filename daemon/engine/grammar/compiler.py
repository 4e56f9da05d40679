"""Matchers by grammar: compiles each grammar once, and keeps the latest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from daemon.models.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 16  # grammars


class Compiler:
    """Compiles grammars in the caller's thread. Thread-safe.

    `load` builds the vocabulary at the first call.
    """

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary. Raises GrammarError if the model has none that grammars can use."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary

    def matcher(self, grammar: str) -> LLMatcher:
        """Return a new matcher, which shares what it finds out with others of this grammar. Raises GrammarError."""
        with self._lock:
            found = self._kept.get(grammar)
        if found is None:
            found = self.vocabulary.compile(grammar)
        with self._lock:
            self._kept[grammar] = found
            self._kept.move_to_end(grammar)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found.deep_copy()

    def unshared(self, grammar: str) -> LLMatcher:
        """Return a new matcher that shares nothing, and forget the one that was kept. Raises GrammarError."""
        with self._lock:
            self._kept.pop(grammar, None)
        return self.vocabulary.compile(grammar)
