"""Sampling on the host: penalties, noise, filters, the draw. The CUDA backend repeats it bit for bit."""
