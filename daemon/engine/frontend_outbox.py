"""Output and notes for one frontend, queued until the ring has room. A step never waits for a reader."""

from __future__ import annotations

from collections import deque

from daemon.engine.migration.actions import Note
from daemon.engine.scheduler import Emission
from daemon.ipc.messages import Finish, HandBack, StepOutput, TokenLogprobs, encode
from daemon.ipc.prompt_logprobs import PromptLogprobs, record_bytes
from daemon.ipc.ring import RingWriter

_ROWS_PER_RECORD = 512  # keeps a record well under half a ring even with 20 logprobs per token
_PROMPT_LOGPROBS = 64 << 10  # bytes of prompt logprobs in a record, for the same reason; a row has no more


class FrontendOutbox:
    """Rows of output and notes for one frontend, each queue in order.

    The two queues may overtake one another: a note carries the output that it depends on. Only a HandBack waits for
    the rows before it: they may have ended the request that it hands back.
    """

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring
        self._rows: deque[Emission] = deque()
        self._notes: deque[Note] = deque()
        self._receiver = 0  # incarnation of the frontend that everything is for

    @property
    def pending(self) -> bool:
        """True if something waits for room on the ring."""
        return bool(self._rows or self._notes)

    def emit(self, emission: Emission) -> None:
        """Queue a row of output."""
        if emission.prompt_logprobs is None:
            self._rows.append(emission)
        else:
            self._rows.extend(_pieces(emission))

    def tell(self, note: Note) -> None:
        """Queue a note."""
        self._notes.append(note)

    def readdress(self, receiver: int) -> None:
        """Address what is queued, and all that follows, to this incarnation of the frontend."""
        self._receiver = receiver

    def flush(self) -> bool:
        """Write as much as the ring takes; return True if anything was written, so that the bell must ring."""
        sent = self._flush_notes()
        sent = self._flush_rows() or sent
        return self._flush_notes() or sent

    def _flush_notes(self) -> bool:
        sent = False
        while self._notes and not (self._rows and isinstance(self._notes[0], HandBack)):
            if not self._ring.put(encode(self._notes[0]), self._receiver):
                break
            self._notes.popleft()
            sent = True
        return sent

    def _flush_rows(self) -> bool:
        sent = False
        while self._rows:
            count = min(len(self._rows), _ROWS_PER_RECORD)
            batch = [self._rows[i] for i in range(count)]
            if any(row.prompt_logprobs for row in batch):
                count = _fitting(batch)
                batch = batch[:count]
            if not self._ring.put(encode(_to_columns(batch)), self._receiver):
                break
            for _ in range(count):
                self._rows.popleft()
            sent = True
        return sent


def _pieces(emission: Emission) -> list[Emission]:
    """Divide an emission with logprobs of its prompt into rows. The last one has its tokens and its finish."""
    start, records = emission.prompt_logprobs or (0, b"")
    size = record_bytes(emission.request.sampling.prompt_logprobs)
    most = _PROMPT_LOGPROBS // size
    rows = []
    while len(records) > most * size:
        piece = PromptLogprobs(start, records[: most * size])
        rows.append(Emission(emission.request, emission.start, [], Finish.NONE, None, piece))
        start, records = start + most, records[most * size :]
    return [*rows, emission._replace(prompt_logprobs=PromptLogprobs(start, records))]


def _fitting(rows: list[Emission]) -> int:
    """Return how many of the rows, at least one, fit one record with the logprobs of their prompts."""
    room = _PROMPT_LOGPROBS
    for i, row in enumerate(rows):
        room -= len(row.prompt_logprobs.records) if row.prompt_logprobs else 0
        if room < 0:
            return max(1, i)
    return len(rows)


def _to_columns(rows: list[Emission]) -> StepOutput:
    """Convert rows to columns: one list per field decodes three times faster than one record per row."""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] | None = None
    if any(row.logprobs for row in rows):
        logprobs = [entry for row in rows for entry in (row.logprobs or [None] * len(row.tokens))]
    scored: dict[int, PromptLogprobs] = {}
    for i, row in enumerate(rows):
        tokens.extend(row.tokens)
        if row.prompt_logprobs is not None:
            scored[i] = row.prompt_logprobs
    return StepOutput(
        rids=[row.request.rid for row in rows],
        epochs=[row.request.epoch for row in rows],
        starts=[row.start for row in rows],
        counts=[len(row.tokens) for row in rows],
        tokens=tokens,
        finishes=[int(row.finish) for row in rows],
        cached=[row.request.num_cached for row in rows],
        logprobs=logprobs,
        prompt_logprobs=scored or None,
    )
