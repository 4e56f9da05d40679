"""A digest of a checkpoint's content, cheap enough for every start of an engine.

It covers the name, type and shape of each tensor and samples of its bytes: 4 KiB of each MiB, and its end. Training,
merging an adapter or quantising changes a tensor everywhere, so samples of every tensor find it, at 0.4 % of the
reading: a checkpoint of 16 GB takes a tenth of a second. Times of modification count for nothing: the same weights,
copied again, are the same, and others with the old time are not.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

from daemon.models.checkpoint import weight_map
from daemon.models.files import ModelError
from daemon.models.safetensors_file import read_header

SAMPLE_BYTES = 4 << 10
STRIDE = 1 << 20  # bytes from one sample of a tensor to the next


def weights_digest(path: Path) -> bytes:
    """Return a digest of the weights in a Hugging Face directory, 16 bytes. Raises ModelError if they are damaged."""
    digest = blake2b(digest_size=16)
    for file in _files(path):
        tensors = read_header(file)
        try:
            with file.open("rb", buffering=0) as f:
                for name, tensor in sorted(tensors.items()):
                    digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
                    last = max(tensor.start, tensor.end - SAMPLE_BYTES)
                    for start in (*range(tensor.start, last, STRIDE), last):
                        digest.update(os.pread(f.fileno(), min(SAMPLE_BYTES, tensor.end - start), start))
        except OSError as e:
            raise ModelError(f"cannot read {file}: {e.strerror}") from None
    return digest.digest()


def file_stamps(path: Path) -> list[tuple[str, int, int, int]]:
    """Return what tells that a weight file was replaced or written: name, inode, size and time of modification."""
    stats = [(file.name, file.stat()) for file in _files(path)]
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats]


def _files(path: Path) -> list[Path]:
    return sorted(set(weight_map(path).values()))
