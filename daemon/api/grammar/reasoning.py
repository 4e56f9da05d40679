"""Grammars of models that reason: what they enforce begins after the reasoning. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from daemon.api.grammar.tools import TokenId, marker
from daemon.api.parse.reasoning import BEGIN, END
from daemon.models.grammar.source import GrammarSource, Reasoning


def after_reasoning(source: GrammarSource, token_id: TokenId, *, open: bool) -> GrammarSource:
    """Return the grammar of an answer that may reason first. `open`: its prompt has begun the reasoning."""
    return replace(source, reasoning=Reasoning(marker(BEGIN, token_id), marker(END, token_id), open))
