"""What processes share: segments, rings, boards, doorbells, journals, tables, and the messages in them."""
