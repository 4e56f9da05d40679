"""CPU backend: model, kernels and runner."""
