"""Engines without a model: `stub` emits at a set rate, `hash` proves its KV."""
