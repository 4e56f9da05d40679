"""The CPU backend: model, kernels and runner."""
