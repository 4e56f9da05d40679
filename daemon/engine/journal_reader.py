"""Reads the frontends' journals. The frontend may overwrite a slot at any time, so a read is verified twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from daemon.engine.request import Request
from daemon.ipc.journal import JournalView, SlotState


class JournalReader:
    """The journals of all frontends, by index. Implements the llumlet's `Journals`.

    `on_grammar` is called with each request that is loaded and has a grammar.
    """

    def __init__(
        self, journals: Sequence[JournalView], on_grammar: Callable[[Request], None] = lambda request: None
    ) -> None:
        self._journals = journals
        self._on_grammar = on_grammar

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        """Return the request with its journaled output and its present priority; None unless the slot holds it at
        exactly this epoch."""
        journal = self._journals[frontend]
        if not _holds(journal, slot, rid, epoch):
            return None
        try:
            prompt = journal.prompt(slot)
            request = Request(
                rid=rid,
                epoch=epoch,
                frontend=frontend,
                params=replace(journal.params(slot), priority=journal.priority(slot)),
                tokens=prompt + journal.output(slot),
                prompt_len=len(prompt),
                slot=slot,
            )
        except ValueError:  # msgspec's errors and UnicodeDecodeError: the bytes of another request
            if _holds(journal, slot, rid, epoch):
                raise
            return None
        request.unscored = max(0, request.unscored - journal.num_prompt_logprobs(slot))
        # The frontend may have closed the request and overwritten the slot during the read.
        if not _holds(journal, slot, rid, epoch):
            return None
        if request.sampling.grammar:
            self._on_grammar(request)
        return request

    def grammar(self, frontend: int, slot: int, rid: int, epoch: int) -> str:
        """Return the grammar of a request; "" if it has none, or the slot does not hold it at exactly this epoch."""
        journal = self._journals[frontend]
        try:
            found = journal.params(slot).sampling.grammar if _holds(journal, slot, rid, epoch) else ""
        except ValueError:  # as above
            return ""
        return found if _holds(journal, slot, rid, epoch) else ""

    def accepted(self, request: Request) -> int:
        """Return the number of output tokens that the frontend has journaled; -1 if the slot belongs to another
        request."""
        journal = self._journals[request.frontend]
        count = journal.num_output(request.slot)
        return count if _holds(journal, request.slot, request.rid, request.epoch) else -1

    def is_scored(self, request: Request) -> bool:
        """Return True if the frontend has journaled all logprobs of the prompt that the request asks for."""
        journal = self._journals[request.frontend]
        return (
            request.sampling.prompt_logprobs < 0
            or journal.num_prompt_logprobs(request.slot) >= request.prompt_len - 1
        )


def _holds(journal: JournalView, slot: int, rid: int, epoch: int) -> bool:
    live = journal.state(slot) is SlotState.LIVE and journal.rid(slot) == rid
    return live and journal.epoch(slot) == epoch
