"""Constrained output: grammars compiled, and masks of the tokens that may come next, beside the engine's steps."""
