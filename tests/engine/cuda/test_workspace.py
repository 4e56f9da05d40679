"""The bytes of workspace for known models. `tests/gpu/test_gpu_plans.py` compares the figures with real plans."""

import pytest

from daemon.engine.cuda.workspace import HeadShape, chunk_workspace, decode_workspace

H100 = 2 * 132  # thread blocks at once
LLAMA_8B = HeadShape(32, 8, 128, 16)
LLAMA_70B = HeadShape(64, 8, 128, 16)
SMALL = HeadShape(4, 2, 64, 16)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "rows", "tiles"),
    [
        (LLAMA_8B, 1, 33),  # as many as run at once
        (LLAMA_8B, 256, 64 + 255),
        (LLAMA_8B, 512, 128 + 511),
        (LLAMA_70B, 512, 256 + 511),
    ],
)
def test_decodes_need_a_partial_result_for_each_tile_of_sixteen_rows(shape, rows, tiles):
    found = decode_workspace(shape, rows=rows, blocks_at_once=H100)
    assert found.floats == shape.heads * tiles * 16 * (128 + 1) * 4


def test_a_large_model_gets_what_its_plan_needs():
    assert decode_workspace(LLAMA_70B, rows=512, blocks_at_once=H100).floats > 384 * MIB


def test_a_small_model_takes_little():
    decodes = decode_workspace(SMALL, rows=64, blocks_at_once=H100)
    chunks = chunk_workspace(SMALL, rows=64, tokens=2048, blocks_at_once=H100)
    assert max(decodes.floats, chunks.floats) < 20 * MIB
    assert decodes.ints + chunks.ints < MIB // 4


def test_a_wide_group_has_larger_tiles():
    """Forty query heads for one KV head: tiles of 64 rows."""
    shape = HeadShape(40, 1, 64, 16)
    found = decode_workspace(shape, rows=8, blocks_at_once=H100)
    assert found.floats == 40 * H100 * 64 * 65 * 4


def test_room_grows_with_rows_and_tokens():
    rooms = [decode_workspace(LLAMA_8B, rows=rows, blocks_at_once=H100) for rows in (1, 40, 200, 512)]
    assert rooms == sorted(rooms)
    rooms = [
        chunk_workspace(LLAMA_8B, rows=rows, tokens=tokens, blocks_at_once=H100)
        for rows, tokens in ((8, 64), (64, 2048), (256, 8192))
    ]
    assert [room.ints for room in rooms] == sorted(room.ints for room in rooms)
