"""Benchmarks; none of it is imported by the daemon."""
