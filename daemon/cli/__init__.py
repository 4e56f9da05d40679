"""The commands `llumd` and `llumctl`, and the checks of `llumd` before it starts processes."""
