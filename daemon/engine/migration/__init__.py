"""Live migration at one engine: the llumlet decides (pure), the executor does the I/O."""
