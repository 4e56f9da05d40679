"""The commands `llumd` and `llumctl`, and the checks that llumd makes before it starts a process."""
