"""The supervisor: the process tree, restarts, systemd. Imports no torch and reads no payloads."""
