"""What an engine reads of the frontends' journals. The writer may overwrite a slot at any moment: look twice."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from daemon.engine.request import Request
from daemon.ipc.journal import JournalView, SlotState


class JournalReader:
    """The journals of all frontends, by their index. Implements the llumlet's `Journals`."""

    def __init__(self, journals: Sequence[JournalView]) -> None:
        self._journals = journals

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        """The request with its journaled output and its present priority; None unless the slot stands for it at
        this very epoch."""
        journal = self._journals[frontend]
        if not _stands(journal, slot, rid, epoch):
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
        except ValueError:  # msgspec's errors and UnicodeDecodeError: bytes of another request
            if _stands(journal, slot, rid, epoch):
                raise
            return None
        # The frontend may have closed it and written another one over it while we read.
        return request if _stands(journal, slot, rid, epoch) else None

    def accepted(self, request: Request) -> int:
        """Output tokens of the request that its frontend has journaled; -1 if its slot is another request's."""
        journal = self._journals[request.frontend]
        count = journal.num_output(request.slot)
        return count if _stands(journal, request.slot, request.rid, request.epoch) else -1


def _stands(journal: JournalView, slot: int, rid: int, epoch: int) -> bool:
    live = journal.state(slot) is SlotState.LIVE and journal.rid(slot) == rid
    return live and journal.epoch(slot) == epoch
