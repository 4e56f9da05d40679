"""The journal of one frontend, and what each request in it counts for in admission."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from daemon.api.admission import Admission, Holder, Places
from daemon.api.generator import Overloaded, RequestAttributes, TooLong
from daemon.ipc.arena import rounded
from daemon.ipc.journal import Failure, Journal, JournalFull, JournalTooSmall, SlotState, layout
from daemon.ipc.messages import Finish, RequestParams, SamplingParams, encode


class RequestStore:
    """Opens, ends and frees the slots of a journal.

    An unfinished request holds a place in the queue limit. Its share of the journal it holds until its output is
    delivered, which may be later.
    """

    def __init__(self, journal: Journal, max_queued: int, max_per_client: int = 0) -> None:
        """Count what `journal` contains already: the requests of a predecessor. The limits: see `Admission`."""
        self.journal = journal
        self.make_room: Callable[[Holder], bool] = lambda holder: False
        """Frees the slots of a stream that has ended and is kept; returns False if there is none."""
        kept = {slot: journal.reserved_bytes(slot) for slot in journal.kept_slots()}
        self._admission = Admission(
            max_queued, journal.free_bytes + sum(kept.values()), journal.num_slots, max_per_client
        )
        for slot, size in kept.items():
            unfinished = journal.state(slot) is SlotState.LIVE
            self._admission.keep(record_holder(journal.params(slot)), size, unfinished=unfinished)

    def take(self, count: int, holder: Holder) -> Places:
        """Take `count` places in the queue limit, released on exit. Raises Overloaded or TooMany."""
        return self._admission.take(count, holder)

    def check_room(
        self,
        lengths: list[tuple[int, int]],
        params: SamplingParams,
        attributes: RequestAttributes,
    ) -> None:
        """Raise TooMany if the journal can never hold all choices of a request: see `Generator.check_room`.

        Seed, label and maximum differ by choice, so each counts with the shortest form that they can have.
        """
        shortest = replace(params, seed=0, max_tokens=1)
        blob = len(encode(journaled_params(shortest, 0.0, attributes)))
        sizes = (layout(blob, prompt, replace(shortest, max_tokens=output)).size for prompt, output in lengths)
        size = sum(map(rounded, sizes))
        self._admission.check_journal(len(lengths), holder_of(attributes), size)

    def open(self, rid: int, record: RequestParams, prompt: Sequence[int], holder: Holder) -> int:
        """Open a journal slot that counts for `holder`. A kept stream that has ended makes room for it.

        Raises Overloaded or TooLong.
        """
        while True:
            try:
                return self._open(rid, record, prompt, holder)
            except Overloaded:
                if not self.make_room(holder):
                    raise

    def _open(self, rid: int, record: RequestParams, prompt: Sequence[int], holder: Holder) -> int:
        try:
            slot = self.journal.open(rid, record, prompt)
        except JournalFull as e:
            raise Overloaded(str(e)) from None
        except JournalTooSmall as e:
            raise TooLong(str(e)) from None
        try:
            self._admission.open(holder, self.journal.reserved_bytes(slot))
        except Overloaded:
            self.journal.close(slot)
            raise
        return slot

    def end(self, slot: int, holder: Holder, finish: Finish, failure: Failure = Failure.NONE) -> None:
        """Journal that the request has ended, and give its place back."""
        self.journal.end(slot, finish, failure)
        self._admission.end(holder)

    def free(self, slot: int, holder: Holder) -> None:
        """Free the slot of a request that has ended: its output is delivered."""
        self._admission.free(holder, self.journal.reserved_bytes(slot))
        self.journal.close(slot)


def journaled_params(params: SamplingParams, arrival: float, attributes: RequestAttributes) -> RequestParams:
    """Return what the journal contains of a request besides its tokens. `arrival`: CLOCK_MONOTONIC seconds."""
    label, priority, cache_salt, client, x_request_id = attributes
    return RequestParams(params, arrival, priority, cache_salt, label, x_request_id, client)


def holder_of(attributes: RequestAttributes) -> Holder:
    """Return what a request counts for in admission."""
    return Holder(attributes.client, attributes.priority < 0)


def record_holder(record: RequestParams) -> Holder:
    """Return the same for a journaled request: as at its admission, because a later priority does not change it."""
    return Holder(record.client, record.priority < 0)
