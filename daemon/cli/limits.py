"""Limits of options that depend on the model or on the machine. Pure."""

from __future__ import annotations

from daemon.config import Config, ConfigError
from daemon.ipc.fabric import Layout, Topology
from daemon.machine import Machine
from daemon.models.model_config import ModelConfig
from daemon.relations import require
from daemon.supervisor.socket_keeper import capacity_of

_FRONTENDS_PER_ENGINE = 2
_CPUS_PER_FRONTEND = 4
_JOURNAL_TOKEN = 8  # bytes: a token of the longest request takes 4, and some room is lost between requests
_DESCRIPTORS = 128  # of each process, for its libraries, its files and some connections
_DESCRIPTORS_PER_PROCESS = 8  # doorbells, journals, pools and pipes, for each process of the daemon


def default_frontends(config: Config, cpus: int) -> int:
    """Return the number of frontends on a machine with GPUs if no option says it: at most the default on GPUs.

    A frontend that is busy needs a CPU, and an engine needs one for its own loop and others to load and to compile.
    """
    return max(1, min(config.frontends, _FRONTENDS_PER_ENGINE * len(config.devices), cpus // _CPUS_PER_FRONTEND))


def check_model_limits(config: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError for lengths that the model, or the journal, does not have."""
    longest = model_config.max_position
    source = "max_position_embeddings, with its rope scaling"
    why = f"{config.max_model_len} is above {longest}, the limit of {model_config.name} ({source})"
    require(config, config.max_model_len <= longest, "max_model_len", f"{why}; lower it, or set it to 0")
    length = config.max_model_len or longest
    why = f"must be below {length}, the maximum length of prompt plus output of {model_config.name}"
    require(config, config.max_prompt_tokens < length, "max_prompt_tokens", why)
    if "max_output_tokens" in config.origin:  # the default gives way to a shorter model
        require(config, config.max_output_tokens < length, "max_output_tokens", why)
    why = f"{_mib(config.journal_memory)} cannot hold a request of {length} tokens, the maximum; set it to at least "
    needed = length * _JOURNAL_TOKEN
    why += f"{_mib(needed)}, or lower max_model_len"
    require(config, needed <= config.journal_memory, "journal_memory", why)


def check_machine_limits(config: Config, machine: Machine, pool_bytes: int) -> None:
    """Raise ConfigError for what the machine does not have. `pool_bytes`: each engine's pool in host memory."""
    why = f"{config.threads} is above {machine.cpus}, the number of CPUs that llumd may use; 0 divides them evenly"
    require(config, config.threads <= machine.cpus, "threads", why)
    topology = Topology(config.frontends, len(config.devices))
    pools, journals = topology.engines * pool_bytes, topology.frontends * config.journal_memory
    outboxes = topology.frontends * config.outbox_memory
    kinds = f"{_mib(pools)} of KV cache and {_mib(outboxes)} of outboxes and {_mib(journals)} of journals"
    shared = Layout(topology).size + pools + journals + outboxes
    bodies = topology.frontends * max(config.body_memory, config.max_body)
    if shared + bodies > machine.memory:
        raise ConfigError(
            f"{kinds}, with {_mib(bodies)} for request bodies, do not fit into the {_mib(machine.memory)} of memory "
            "that are free; lower kv_memory, journal_memory, outbox_memory or body_memory"
        )
    if shared > machine.shared_memory:
        raise ConfigError(
            f"/dev/shm has no room for {_mib(shared)} of shared memory ({kinds}), only for "
            f"{_mib(machine.shared_memory)}; make it larger (docker: --shm-size) or lower kv_memory, "
            "journal_memory or outbox_memory"
        )
    needed = _DESCRIPTORS + _DESCRIPTORS_PER_PROCESS * topology.processes + config.max_connections
    if needed > machine.descriptors:
        raise ConfigError(
            f"the limit of open files is {machine.descriptors}, and {topology.processes} processes need at least "
            f"{needed} each; raise it (ulimit -n; systemd: LimitNOFILE)"
        )


def kept_connections_warning(config: Config, machine: Machine) -> str:
    """Return what to say if not every connection can outlive its frontend; "" if each can."""
    kept = capacity_of(machine.descriptors, Topology(config.frontends, len(config.devices)))
    if config.max_connections <= kept:
        return ""
    return (
        f"warning: max_connections is {config.max_connections}, but with {machine.descriptors} open files only "
        f"{kept} connections of each frontend can outlive it: a response on any other ends with it; lower "
        "max_connections, or raise the limit of open files (ulimit -n; systemd: LimitNOFILE)"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
