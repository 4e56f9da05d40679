"""Runners without a model: `stub` emits tokens at a fixed rate, `hash` proves that its KV is correct, `script` plays
a script.
"""
