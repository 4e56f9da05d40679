"""Live migration as an engine sees it: the llumlet decides (pure), the executor carries it out."""
