"""Shared memory between processes: segments, rings, boards, doorbells, journals, tables, and the messages in them."""
