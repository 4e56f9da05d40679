"""KV blocks: who holds which (pure), where they lie (memory), how they move (transfer)."""
