"""KV cache blocks: their accounting (pure), the pools of other engines, and copies between pools."""
