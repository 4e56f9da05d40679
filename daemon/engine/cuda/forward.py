"""The two passes of a step on the device: its decodes, which a graph may replay, then its chunks.

Their logits and tokens end up in one buffer: decodes in ``[0, bucket)``, sampled chunks behind them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from daemon.engine.cuda.arrays import Inputs, Size, input_fields
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.model import Llama
from daemon.engine.cuda.sampler import DeviceSampler, SampleParams
from daemon.engine.cuda.small_batch import Way
from daemon.engine.cuda.staging import Field, Packed, host_memory


class Room(NamedTuple):
    """The most that each pass, and both together, can hold."""

    decodes: Size
    chunks: Size
    sampled: int
    vocab_size: int
    slots: int  # without the dummy


class Buffer:
    """An `Inputs` in one piece of memory, on the host or on the device."""

    def __init__(self, packed: Packed, memory: torch.Tensor) -> None:
        self.memory = memory
        self.tensors = Inputs(**packed.tensors(memory))
        self._packed = packed

    def copy_from(self, other: Buffer, pages: int) -> None:
        """Take over what `other`, of the same make, holds with so many pages."""
        used = self._packed.used(pages)
        self.memory[:used].copy_(other.memory[:used], non_blocking=True)


class Staged:
    """One set of host buffers: what a step reads, and the tokens that come back."""

    def __init__(self, turn: int, room: Room, *, pinned: bool) -> None:
        self.turn = turn
        self.decodes = _host_buffer(room.decodes, pinned)
        self.chunks = _host_buffer(room.chunks, pinned)
        self.decode_arrays = Inputs(*(tensor.numpy() for tensor in self.decodes.tensors))
        self.chunk_arrays = Inputs(*(tensor.numpy() for tensor in self.chunks.tensors))
        self.tokens = host_memory(4 * room.sampled, pinned=pinned).view(torch.int32)


def _host_buffer(room: Size, pinned: bool) -> Buffer:
    packed = _packed(room)
    return Buffer(packed, host_memory(packed.nbytes, pinned=pinned))


def _packed(room: Size) -> Packed:
    return Packed([Field(*field) for field in input_fields(room)])


class Passes:
    """The device's static buffers, and what is computed from them. Every call must come from the stream's work."""

    def __init__(
        self, model: Llama, attention: Attention, sampler: DeviceSampler, room: Room, device: torch.device
    ) -> None:
        self.logits = torch.zeros(room.sampled, room.vocab_size, dtype=torch.float32, device=device)
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._tokens = torch.zeros(room.sampled, dtype=torch.int32, device=device)
        self._last_token = torch.zeros(room.slots + 1, dtype=torch.int32, device=device)
        self._decodes, self._chunks = (
            Buffer(packed, torch.zeros(packed.nbytes, dtype=torch.uint8, device=device))
            for packed in (_packed(room.decodes), _packed(room.chunks))
        )
        self._pages = room.decodes.pages

    def prepare(self, staged: Staged, bucket: int) -> None:
        """Make decodes of `bucket` rows possible; `staged` holds some."""
        self._attention.prepare(bucket, self._decodes.tensors, staged.decodes.tensors)

    def plan_decodes(self, staged: Staged, size: Size) -> None:
        """Bring a step's decodes, padded to a bucket, onto the device."""
        self._decodes.copy_from(staged.decodes, size.pages)
        self._attention.plan(staged.decodes.tensors, self._decodes.tensors, size, decode=True, turn=staged.turn)

    def decode(self, bucket: int, way: Way = "all rows") -> None:
        """Compute the decodes that are on the device. Can be captured: the same work on the same buffers always."""
        # All of the pages' buffer: how much of it is filled changes from replay to replay.
        inputs = self._decodes.tensors.cut(Size(bucket, bucket, bucket, self._pages))
        self._compute(inputs, 0, bucket, decode=True, way=way)

    def chunks(self, staged: Staged, size: Size, first: int) -> None:
        """Bring a step's chunks onto the device and compute them; their tokens go to `first` and behind."""
        self._chunks.copy_from(staged.chunks, size.pages)
        inputs = self._chunks.tensors.cut(size)
        self._attention.plan(staged.chunks.tensors.cut(size), inputs, size, decode=False, turn=staged.turn)
        self._compute(inputs, first, size.sampled, decode=False)

    def fetch(self, staged: Staged, count: int) -> None:
        """Send the first `count` tokens back to the host."""
        staged.tokens[:count].copy_(self._tokens[:count], non_blocking=True)

    def _compute(self, inputs: Inputs, first: int, sampled: int, *, decode: bool, way: Way = "all rows") -> None:
        logits = self.logits[first : first + sampled]
        self._model.logits(inputs, self._last_token, logits, decode=decode, way=way)
        if not sampled:
            return
        tokens = self._tokens[first : first + sampled]
        self._sampler.draw(logits, _sample_params(inputs), out=tokens)
        self._last_token.index_copy_(0, inputs.drawn_slots, tokens)


def _sample_params(inputs: Inputs) -> SampleParams:
    return SampleParams(
        inputs.inverse_temperature, inputs.min_p_depth, inputs.top_k, inputs.top_p, inputs.seed, inputs.draw_position
    )
