"""The package of the discrete-event simulator, which is not written yet.

It will drive the same scheduler, block manager, llumlet, ownership and policy objects as the daemon, with a virtual
clock. It may import `engine`, `kvpool`, `ipc` and `control.policy`; only `cli` may import it.
"""
