"""A nemesis: faults in a real daemon under load, and proof that no client notices. See bench/README.md."""
