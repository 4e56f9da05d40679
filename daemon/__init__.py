"""llumd: serve one LLM from every GPU of a box, and move requests between GPUs while they run."""

__version__ = "0.1.0"
