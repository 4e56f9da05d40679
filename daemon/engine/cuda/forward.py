"""The passes of a step on the device: decodes, which a graph may replay; prefill chunks; or both in one pass.

Their logits and tokens are in one buffer: decodes in ``[0, bucket)``, sampled chunks behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from daemon.engine.cuda.arrays import Inputs, Size, input_fields
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.buckets import widest_gap
from daemon.engine.cuda.masked_rows import MaskedCount, MaskedRows, StagedMasks
from daemon.engine.cuda.model import Decoder, Part
from daemon.engine.cuda.sampler import DeviceSampler, SamplingTensors
from daemon.engine.cuda.scoring import PassScores
from daemon.engine.cuda.small_batch import DecodePath
from daemon.engine.cuda.staging import Field, Packed, host_memory


class Capacity(NamedTuple):
    """Sizes of the buffers of each pass, and of both together."""

    decodes: Size
    chunks: Size
    sampled: int
    vocab_size: int
    slots: int  # without the dummy


def capacity_of(buckets: Sequence[int], tokens: int, *, pages: int, vocab_size: int, in_flight: int) -> Capacity:
    """Return the sizes for steps of at most ``buckets[-1]`` rows with `pages` pages each, and `tokens` in chunks."""
    rows = buckets[-1]
    return Capacity(
        decodes=Size(rows, rows, rows, rows * pages),
        chunks=Size(tokens, rows, rows, rows * pages),
        # A step has at most `rows` rows, but the chunks' tokens are behind the padded decodes.
        sampled=rows + widest_gap(buckets),
        vocab_size=vocab_size,
        slots=in_flight * rows,
    )


class Buffer:
    """An `Inputs` in one memory block, on the host or on the device."""

    def __init__(self, packed: Packed, memory: torch.Tensor) -> None:
        self.memory = memory
        self.tensors = Inputs(**packed.tensors(memory))
        self._packed = packed

    def copy_from(self, other: Buffer, pages: int) -> None:
        """Copy the first `pages` pages and all other arrays of `other`, which has the same layout."""
        used = self._packed.used(pages)
        self.memory[:used].copy_(other.memory[:used], non_blocking=True)


class StagingSet:
    """One set of host buffers: the inputs of a step, and the tokens that it returns."""

    def __init__(self, staging_index: int, capacity: Capacity, *, pinned: bool) -> None:
        self.staging_index = staging_index
        self.decodes = _host_buffer(capacity.decodes, pinned)
        self.chunks = _host_buffer(capacity.chunks, pinned)
        self.decode_arrays = Inputs(*(tensor.numpy() for tensor in self.decodes.tensors))
        self.chunk_arrays = Inputs(*(tensor.numpy() for tensor in self.chunks.tensors))
        self.tokens = host_memory(4 * capacity.sampled, pinned=pinned).view(torch.int32)
        self.masks = StagedMasks(capacity.sampled, capacity.vocab_size, pinned=pinned)


def _host_buffer(capacity: Size, pinned: bool) -> Buffer:
    packed = _packed(capacity)
    return Buffer(packed, host_memory(packed.nbytes, pinned=pinned))


def _packed(capacity: Size) -> Packed:
    return Packed([Field(*field) for field in input_fields(capacity)])


class ForwardPass:
    """The device's static buffers and the computation over them. Call it only from work in the stream."""

    def __init__(
        self, model: Decoder, attention: Attention, sampler: DeviceSampler, capacity: Capacity, device: torch.device
    ) -> None:
        self.logits = torch.zeros(capacity.sampled, capacity.vocab_size, dtype=torch.float32, device=device)
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._masked_rows = MaskedRows(sampler, capacity.sampled, capacity.vocab_size, device)
        self._tokens = torch.zeros(capacity.sampled, dtype=torch.int32, device=device)
        self._last_token = torch.zeros(capacity.slots + 1, dtype=torch.int32, device=device)
        self._decodes, self._chunks = (
            Buffer(packed, torch.zeros(packed.nbytes, dtype=torch.uint8, device=device))
            for packed in (_packed(capacity.decodes), _packed(capacity.chunks))
        )
        self._pages = capacity.decodes.pages

    def prepare(self, staged: StagingSet, bucket: int) -> None:
        """Prepare decodes of `bucket` rows. `staged` holds a valid decode step of that size."""
        self._attention.prepare(bucket, self._decodes.tensors, staged.decodes.tensors)

    def plan_decodes(self, staged: StagingSet, size: Size) -> None:
        """Copy a step's decodes, padded to a bucket, to the device, and plan their attention."""
        self._decodes.copy_from(staged.decodes, size.pages)
        self._attention.plan(
            staged.decodes.tensors, self._decodes.tensors, size, decode=True, staging_index=staged.staging_index
        )

    def decode(self, bucket: int, decode_path: DecodePath = "gemm") -> None:
        """Compute the decodes that are on the device. It can be captured: it always does the same work on the same
        buffers."""
        self._compute([self._decode_part(bucket)], 0, decode_path)

    def chunks(self, staged: StagingSet, size: Size, first: int, scores: PassScores | None = None) -> None:
        """Copy a step's chunks to the device and compute them. Their tokens are stored from index `first` on."""
        self._compute([self._chunk_part(staged, size)], first, scores=scores)

    def mixed(self, staged: StagingSet, size: Size, bucket: int, scores: PassScores | None = None) -> None:
        """Copy a step's chunks to the device, and compute them in one pass with the decodes that are there.

        After torch.OutOfMemoryError this or `decode` may be called again: the decodes' inputs are unchanged.
        """
        self._compute([self._decode_part(bucket), self._chunk_part(staged, size)], 0, scores=scores)

    def sample_masked(self, staged: StagingSet, masked: MaskedCount, bucket: int) -> None:
        """Sample the rows of `staged.masks` again, under their masks. No later step may have been submitted."""
        count, decodes = masked
        self._masked_rows.copy(staged.masks, count)
        for first, last, inputs, offset in ((0, decodes, self._decodes, 0), (decodes, count, self._chunks, bucket)):
            params = _sampling_tensors(inputs.tensors)
            self._masked_rows.sample(self.logits, self._tokens, params, first=first, last=last, offset=offset)

    def fetch(self, staged: StagingSet, count: int) -> None:
        """Copy the first `count` tokens to the host."""
        staged.tokens[:count].copy_(self._tokens[:count], non_blocking=True)

    def _decode_part(self, bucket: int) -> Part:
        # The whole buffer of pages: the filled part changes from replay to replay.
        return Part(self._decodes.tensors.cut(Size(bucket, bucket, bucket, self._pages)), decode=True)

    def _chunk_part(self, staged: StagingSet, size: Size) -> Part:
        """Copy a step's chunks to the device, and plan their attention."""
        self._chunks.copy_from(staged.chunks, size.pages)
        inputs = self._chunks.tensors.cut(size)
        self._attention.plan(
            staged.chunks.tensors.cut(size), inputs, size, decode=False, staging_index=staged.staging_index
        )
        return Part(inputs, decode=False)

    def _compute(
        self,
        parts: Sequence[Part],
        first: int,
        decode_path: DecodePath = "gemm",
        scores: PassScores | None = None,
    ) -> None:
        counts = [len(part.inputs.sampled_slots) for part in parts]
        logits = self.logits[first : first + sum(counts)]
        self._model.logits(parts, self._last_token, logits, decode_path=decode_path, scores=scores)
        tokens = self._tokens[first : first + sum(counts)].split(counts)
        for part, rows, drawn in zip(parts, logits.split(counts), tokens, strict=True):
            if len(drawn):
                self._sampler.sample(rows, _sampling_tensors(part.inputs), out=drawn)
        # Last of all: a pass that runs out of memory is computed again, from the same last tokens.
        for part, drawn in zip(parts, tokens, strict=True):
            if len(drawn):
                self._last_token.index_copy_(0, part.inputs.sampled_slots, drawn)


def _sampling_tensors(inputs: Inputs) -> SamplingTensors:
    return SamplingTensors(
        inputs.inverse_temperature,
        inputs.min_p_depth,
        inputs.top_k,
        inputs.top_p,
        inputs.seed,
        inputs.sample_position,
    )
