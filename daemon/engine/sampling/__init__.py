"""Sampling on the host: penalties, filters, noise, sampler. The CUDA backend computes the same, bit for bit."""
