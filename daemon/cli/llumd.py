"""The `llumd` command: `serve`, `check`, `options` and `kernels`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daemon import __version__
from daemon import config as settings
from daemon.api.key_file import read_key_file
from daemon.cli.prepare import Prepared, prepare
from daemon.config import Config, ConfigError
from daemon.ipc import output
from daemon.ipc.child import EXIT_CONFIG, EXIT_FAILED, start_logging
from daemon.models import store
from daemon.models.model_config import ModelConfig, ModelError, read_model_config
from daemon.option import allowed
from daemon.supervisor.start_error import StartError, explain
from daemon.units import format_value

if TYPE_CHECKING:
    from daemon.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

_BACKLOG = 4096
_MAX_DESCRIPTORS = 1 << 17  # no process needs more; the hard limit in a container may be a thousand million
_EXAMPLE = """\
llumd serves {name} at {url}
  {engines} engine{s} ready; for example:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{name}", "temperature": 0,
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  llumctl{ctl} top"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `llumd` command."""
    args = _parser().parse_args(argv)
    sys.exit(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llumd", description="Serve one language model from all GPUs of a machine.")
    parser.add_argument("--version", action="version", version=f"llumd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model until SIGTERM or SIGINT")
    _add_options(serve)
    serve.set_defaults(run=_serve)
    check = commands.add_parser("check", help="check the settings and the model, then exit")
    _add_options(check)
    check.set_defaults(run=_check)
    table = commands.add_parser("options", help="print all options as a Markdown table")
    table.set_defaults(run=_options)
    _add_kernels(commands.add_parser("kernels", help="compile or list the kernels that GPUs need"))
    return parser


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="compile the kernels of a model with nvcc; needs no GPU")
    build.add_argument(
        "model", nargs="?", default="demo", metavar="MODEL", help="as in `llumd serve` (default: demo)"
    )
    build.add_argument("--arch", metavar="9.0a", help="compute capability (default: of the GPUs in this machine)")
    build.add_argument(
        "--dtype", choices=("bf16", "fp16"), default="bf16", help="type of activations (default: bf16)"
    )
    build.add_argument(
        "--kv-dtype", choices=("auto", "fp8"), default="auto", help="type of the KV cache (default: auto, as --dtype)"
    )
    build.add_argument("--prefill", choices=("fa2", "fa3"), default="fa2", help="prefill kernel (default: fa2)")
    build.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="compilers that run at the same time (default: as many as fit)",
    )
    build.set_defaults(run=_build_kernels)
    listing = commands.add_parser("list", help="list compiled kernels")
    listing.set_defaults(run=_list_kernels)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_", nargs="?", metavar="MODEL", help="demo, a Hugging Face directory or a .gguf file")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with options (default: /etc/llumd/config.toml if it exists)",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in settings.options():
        meta = option.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        flag = "--" + option.name.replace("_", "-")
        text = f"{meta['meaning']} [{_default(option)}]".replace("%", "%%")
        if option.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            name = "|".join(map(str, meta["choices"])) or option.name.upper()
            group.add_argument(flag, dest=option.name, default=None, metavar=name, help=text)


def _load(args: argparse.Namespace) -> Config:
    flags = {o.name: getattr(args, o.name) for o in settings.options() if getattr(args, o.name) is not None}
    if args.model_ is not None:
        flags["model"] = args.model_
    file = args.config or (Path("/etc/llumd/config.toml") if Path("/etc/llumd/config.toml").exists() else None)
    return settings.load(flags, file)


def _serve(args: argparse.Namespace) -> int:
    output.tolerate_loss()
    _await_signals()
    _raise_descriptor_limit()
    try:
        config = _load(args)
        start_logging(config.log_level, "supervisor")
        return _run(prepare(config, _print_progress))
    except (ConfigError, ModelError, StartError) as e:
        print(f"llumd: {e}", file=sys.stderr)
        return EXIT_CONFIG
    except OSError as e:
        print(f"llumd: cannot start: {explain(e)}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("llumd: stopped by a signal before any process was started", file=sys.stderr)
        return 0


def _await_signals() -> None:
    """Until the supervisor handles signals, let SIGTERM end the start as Ctrl-C does, and a closed terminal not."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, lambda *_: None)


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one, for all processes: each HTTP connection needs one.

    The soft limit is low only for programs that use select(), which this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check(args: argparse.Namespace) -> int:
    try:
        config, model_config, _, pool_bytes, _ = prepare(_load(args), _print_progress)
    except (ConfigError, ModelError) as e:
        print(f"llumd: {e}", file=sys.stderr)
        return EXIT_CONFIG
    n = len(config.devices)
    kv = "KV cache in the free memory of the GPUs" if config.on_gpus else f"{pool_bytes >> 20} MiB of KV cache each"
    print(f"{model_config.name}: {n} engine{'s' if n > 1 else ''}, {kv}; the settings are valid")
    return 0


def _options(_args: argparse.Namespace) -> int:
    print(option_table())
    return 0


def option_table() -> str:
    """Return a Markdown table of all options, for docs/configuration.md."""
    lines = ["| option | default | unit | allowed | meaning |", "|---|---|---|---|---|"]
    defaults = Config()
    for option in settings.options():
        unit, gpu = option.metadata["unit"], option.metadata["gpu"]
        text = format_value(getattr(defaults, option.name), unit)
        default = f"`{text}`" if text else ""
        default += f"; on GPUs `{format_value(gpu, unit)}`" if gpu is not None else ""
        meaning = option.metadata["meaning"].replace("|", "\\|")
        lines.append(f"| `{option.name}` | {default} | {unit} | {allowed(option)} | {meaning} |")
    return "\n".join(lines)


def _default(option: settings.Option) -> str:
    """Return the default and the unit of an option, for its help text."""
    unit, gpu = option.metadata["unit"], option.metadata["gpu"]
    text = format_value(getattr(Config(), option.name), unit) or "empty"
    on_gpus = f", on GPUs {format_value(gpu, unit)}" if gpu is not None else ""
    return f"default: {text}{on_gpus}" + (f"; unit: {unit}" if unit else "")


def _build_kernels(args: argparse.Namespace) -> int:
    from daemon.engine.cuda import compile as kernel_compiler
    from daemon.engine.cuda import kernels

    try:
        archs = {kernels.parse_arch(args.arch)} if args.arch else set(kernels.gpu_archs())
        if not archs:
            raise kernels.KernelError(
                "no GPU is visible; name the architecture to compile for, for example --arch 9.0a"
            )
        model_dir = store.resolve(args.model, "auto", _print_progress)
        model_config = read_model_config(model_dir)  # kernels do not depend on weights
        for arch in sorted(archs):
            specs = kernels.required(
                model_config, arch=arch, dtype=args.dtype, kv_dtype=args.kv_dtype, prefill=args.prefill
            )
            kernel_compiler.build(specs, arch, kernels.directory(arch), _print_progress, jobs=args.jobs)
            print(f"{len(specs)} kernels of {model_config.name} for {arch} are in {kernels.directory(arch)}")
    except (kernels.KernelError, ModelError) as e:
        print(f"llumd: {e}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _list_kernels(_args: argparse.Namespace) -> int:
    from daemon.engine.cuda import kernels

    root = kernels.kernels_dir()
    found = kernels.listing(root)
    if not found:
        print(f"no compiled kernels in {root}; `llumd kernels build` compiles them")
    for where, modules in found.items():
        print(where)
        for built in modules:
            print(f"  {built.size / 2**20:6.1f} MiB  nvcc {built.nvcc}  {built.name}")
    return 0


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(prepared: Prepared) -> int:
    """Open the sockets and run the supervisor until it ends. Return the exit code. Raises OSError and StartError."""
    from daemon.supervisor.key_reload import KeySource
    from daemon.supervisor.supervisor import Supervisor

    config, model_config, model_dir, pool_bytes, keys = prepared
    directory = settings.run_dir(config)
    lock = _lock(directory)
    try:
        http = _listen(config)
        config = dataclasses.replace(config, port=http.getsockname()[1])
        admin = _listen_admin(directory / "admin.sock")
        try:
            key_source = KeySource(keys, lambda: read_key_file(Path(config.api_key_file))) if keys else None
            supervisor = Supervisor(config, str(model_dir), pool_bytes, http, admin, key_source)
            return _supervise(supervisor, lambda: _announce(config, model_config, directory))
        finally:
            (directory / "admin.sock").unlink(missing_ok=True)
    finally:
        os.close(lock)


def _supervise(supervisor: Supervisor, announce: Callable[[], None]) -> int:
    try:
        return supervisor.run(announce)
    except StartError:
        raise
    except Exception:
        log.exception("the supervisor has failed, so all processes were ended; please report this")
        return EXIT_FAILED


def _announce(config: Config, model_config: ModelConfig, directory: Path) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    n = len(config.devices)
    ctl = f" --run-dir {directory}" if config.run_dir else ""
    url = f"http://{host}:{config.port}"
    text = _EXAMPLE.format(name=model_config.name, url=url, engines=n, s="s" if n > 1 else "", ctl=ctl)
    print(text, flush=True)


def _lock(directory: Path) -> int:
    """Lock the run directory and return the descriptor of the lock. The kernel releases it when the process ends."""
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ConfigError(
            f"run_dir: cannot use {directory}: {e.strerror}; choose another directory with --run-dir"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(
            f"run_dir: another llumd uses {directory}; stop it, or choose another directory with --run-dir"
        ) from None
    return fd


def _listen(config: Config) -> socket.socket:
    """Open the listening socket that all frontends share, so that a killed frontend loses no queued connection."""
    try:
        info = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        sock.listen(_BACKLOG)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port: {config.port} on {config.host} is in use; choose another port with --port"
            ) from None
        raise ConfigError(
            f"host: cannot listen on {config.host}:{config.port}: {e.strerror}; choose another address with --host"
        ) from None
    return sock


def _listen_admin(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # We hold the lock, so the socket is from a daemon that was killed.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        sock.bind(str(path))
    except OSError as e:
        raise ConfigError(f"run_dir: cannot create {path}: {e.strerror or e}") from None
    finally:
        os.umask(before)
    sock.listen(64)
    return sock


if __name__ == "__main__":
    main()
