"""The error of a grammar that cannot be used."""

from __future__ import annotations


class GrammarError(Exception):
    """A grammar cannot be compiled, or needs too much to be. The message is for the client."""
