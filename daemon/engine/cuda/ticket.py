"""A step in flight on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.engine import prompt_scores
from daemon.engine.cuda.forward import StagingSet
from daemon.engine.cuda.masked_rows import MaskedCount
from daemon.engine.cuda.scoring import PassScores
from daemon.engine.cuda.staging import StreamEvent
from daemon.engine.runner import StepPlan

_POLL = 0.0005  # seconds


@dataclass(slots=True, eq=False)
class CudaTicket:
    """A step in flight."""

    plan: StepPlan
    slots: list[int]
    bucket: int  # decodes, padding included; 0: no decodes
    chunks: list[int]  # plan rows of the chunks
    one_pass: bool  # decodes and chunks are computed together
    host_rows: list[int]  # plan rows with tokens that are sampled on the host
    masked_rows: list[int]  # plan rows with tokens that are sampled on the device once their masks are there
    staged: StagingSet
    dropped: list[int] = field(default_factory=list)  # plan rows that were not computed: out of memory
    scores: PassScores | None = None  # of the chunks' prompts
    done_event: StreamEvent = field(init=False)

    @property
    def blocks_overlap(self) -> bool:
        """True if the next step can only be planned when this one is collected."""
        return bool(self.host_rows or self.masked_rows)

    def output_rows(self) -> dict[int, int]:
        """Return the index in the step's tokens and logits of each computed row that samples, by plan row."""
        rows = self.plan.rows
        output_rows = {i: i for i in range(self.plan.num_decodes) if rows[i].sample}
        sampled = [i for i in self.chunks if rows[i].sample]
        return output_rows | {i: self.bucket + n for n, i in enumerate(sampled)}

    @property
    def num_outputs(self) -> int:
        """Length of the step's tokens and logits, with those of padding rows."""
        return self.bucket + sum(self.plan.rows[i].sample for i in self.chunks)

    def fill_masks(self) -> tuple[MaskedCount, dict[int, int]]:
        """Store the masks of the masked rows in the staging set. Wait for them at least as long as the step runs.

        Return the number of masks, and what stands for the token of each row, by output row, without a mask.
        """
        rows, masks, output_rows = self.plan.rows, self.plan.masks, self.output_rows()
        while masks is not None and not self.done_event.is_done() and not masks.wait(_POLL):
            pass  # the device has other work as long as the step is not done
        masked = [i for i in self.masked_rows if i in output_rows]  # decodes first
        missing = self.staged.masks.fill([rows[i].request for i in masked], [output_rows[i] for i in masked], masks)
        return MaskedCount(len(masked), sum(i < self.plan.num_decodes for i in masked)), missing

    def prompt_logprobs(self) -> dict[int, bytes] | None:
        """Return the records of the step, see `StepResult`. Call it after `done_event`."""
        if self.scores is None:
            return None
        rows = [self.plan.rows[i] for i in self.chunks]
        return {self.chunks[n]: data for n, data in prompt_scores.records(rows, self.scores.on_host()).items()}
