"""What the journals and outboxes of a running daemon hold, read through the descriptors of its supervisor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from daemon.api.response_facts import decode_facts
from daemon.ipc import outbox, segment
from daemon.ipc.journal import JournalView


class SharedMemory:
    """Maps all journals and outboxes, read-only."""

    def __init__(self, supervisor: int, journal_bytes: int, outbox_bytes: int) -> None:
        """`supervisor`: its pid. The sizes must differ from each other, and from those of all other segments."""
        sizes = {journal_bytes: "journal", outbox_bytes: "outbox"}
        found: dict[str, list[tuple[int, memoryview]]] = {"journal": [], "outbox": []}
        for fd in Path(f"/proc/{supervisor}/fd").iterdir():
            if "llumd-" in os.readlink(fd) and (kind := sizes.get(fd.stat().st_size)):
                handle = os.open(fd, os.O_RDONLY)
                found[kind].append((int(fd.name), segment.attach(handle, writable=False)))
                os.close(handle)
        self._journals = [JournalView(view) for _, view in sorted(found["journal"], key=lambda pair: pair[0])]
        self._outboxes = [view for _, view in sorted(found["outbox"], key=lambda pair: pair[0])]
        self._names: dict[tuple[int, ...], str] = {}  # x-request-id of a response, by all that identifies its slot

    def journal_slots(self) -> int:
        """Return the number of requests that a journal has: unfinished, or not delivered yet."""
        return sum(len(journal.kept_slots()) for journal in self._journals)

    def outbox_slots(self) -> int:
        """Return the number of responses that an outbox has."""
        return sum(1 for view in self._outboxes for _ in _live_slots(view))

    def guarded(self) -> dict[str, int]:
        """Return the frontend of each response that an outbox has, by x-request-id."""
        found = {}
        for frontend, view in enumerate(self._outboxes):
            for slot in _live_slots(view):
                key = (frontend, *slot)
                if key not in self._names:
                    with contextlib.suppress(ValueError, msgspec.MsgspecError):  # it has just been closed
                        at, size = slot[-2] >> 32, slot[-2] & 0xFFFFFFFF
                        self._names[key] = decode_facts(bytes(view[at : at + size])).request_id
                if name := self._names.get(key):
                    found[name] = frontend
        return found


def _live_slots(view: memoryview) -> Iterator[tuple[int, ...]]:
    """Yield the number of each slot in use, and those of its words that do not change while it is."""
    count = len(view) // outbox.BYTES_PER_SLOT
    words = view[: count * outbox.SLOT_WORDS * 8].cast("Q")
    for slot in range(count):
        state, _, *rest = words[slot * outbox.SLOT_WORDS : slot * outbox.SLOT_WORDS + 6].tolist()
        if state == outbox.SlotState.LIVE:
            yield slot, *rest
