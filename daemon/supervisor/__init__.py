"""The supervisor: the process tree, restarts and systemd. It imports no torch and reads no payloads."""
