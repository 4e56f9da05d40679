"""Runs real client libraries against a daemon: see `bench.clients.run`."""
