"""A step in flight on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.engine import prompt_scores
from daemon.engine.cuda.forward import StagingSet
from daemon.engine.cuda.scoring import PassScores
from daemon.engine.cuda.staging import StreamEvent
from daemon.engine.runner import StepPlan


@dataclass(slots=True, eq=False)
class CudaTicket:
    """A step in flight."""

    plan: StepPlan
    slots: list[int]
    bucket: int  # decodes, padding included; 0: no decodes
    chunks: list[int]  # plan rows of the chunks
    one_pass: bool  # decodes and chunks are computed together
    host_rows: list[int]  # plan rows with tokens that are sampled on the host
    staged: StagingSet
    dropped: list[int] = field(default_factory=list)  # plan rows that were not computed: out of memory
    scores: PassScores | None = None  # of the chunks' prompts
    done_event: StreamEvent = field(init=False)

    def output_rows(self) -> dict[int, int]:
        """Return the index in the step's tokens and logits of each computed row that samples, by plan row."""
        rows = self.plan.rows
        output_rows = {i: i for i in range(self.plan.num_decodes) if rows[i].sample}
        sampled = [i for i in self.chunks if rows[i].sample]
        return output_rows | {i: self.bucket + n for n, i in enumerate(sampled)}

    def prompt_logprobs(self) -> dict[int, bytes] | None:
        """Return the records of the step, see `StepResult`. Call it after `done_event`."""
        if self.scores is None:
            return None
        rows = [self.plan.rows[i] for i in self.chunks]
        return {self.chunks[n]: data for n, data in prompt_scores.records(rows, self.scores.on_host()).items()}
