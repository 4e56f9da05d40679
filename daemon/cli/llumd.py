"""The `llumd` command: serve, check, options, kernels."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from daemon import __version__
from daemon import config as settings
from daemon.cli import devices
from daemon.cli.memory_budget import kv_pool_bytes
from daemon.config import Config, ConfigError
from daemon.ipc.child import EXIT_CONFIG, start_logging
from daemon.ipc.segment import SegmentError
from daemon.models import store
from daemon.models.model_config import ModelConfig, ModelError, check_tokenizer, read_model_config

_BACKLOG = 4096
_EXAMPLE = """\
llumd serves {name} at {url}
  {engines} engine{s} ready; try

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{name}", "temperature": 0,
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  llumctl{ctl} top"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llumd`."""
    args = _parser().parse_args(argv)
    sys.exit(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llumd", description="Serve one LLM from every GPU of this box.")
    parser.add_argument("--version", action="version", version=f"llumd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model until SIGTERM")
    _add_options(serve)
    serve.set_defaults(run=_serve)
    check = commands.add_parser("check", help="check settings and model, start nothing")
    _add_options(check)
    check.set_defaults(run=_check)
    table = commands.add_parser("options", help="list every option as a Markdown table")
    table.set_defaults(run=_options)
    _add_kernels(commands.add_parser("kernels", help="compile and list the kernels that GPUs need"))
    return parser


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="compile what a model needs, with nvcc; no GPU is needed")
    build.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="as for serve (default: demo)")
    build.add_argument("--arch", metavar="9.0a", help="compute capability; default: of the GPUs in this machine")
    build.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="arithmetic (default: bf16)")
    build.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="KV cache (default: as --dtype)")
    build.add_argument("--prefill", choices=("fa2", "fa3"), default="fa2", help="prefill kernel (default: fa2)")
    build.add_argument("--jobs", type=int, default=0, metavar="N", help="compilers at a time; default: what fits")
    build.set_defaults(run=_build_kernels)
    listing = commands.add_parser("list", help="list compiled kernels")
    listing.set_defaults(run=_list_kernels)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_", nargs="?", metavar="MODEL", help="demo, a Hugging Face directory or a .gguf file")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of the options below")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in settings.options():
        meta = option.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        flag = "--" + option.name.replace("_", "-")
        text = meta["meaning"].replace("%", "%%") + (f" [{meta['unit']}]" if meta["unit"] else "")
        if option.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            name = "|".join(meta["choices"]) or option.name.upper()
            group.add_argument(flag, dest=option.name, default=None, metavar=name, help=text)


def _load(args: argparse.Namespace) -> Config:
    flags = {o.name: getattr(args, o.name) for o in settings.options() if getattr(args, o.name) is not None}
    if args.model_ is not None:
        flags["model"] = args.model_
    file = args.config or (Path("/etc/llumd/config.toml") if Path("/etc/llumd/config.toml").exists() else None)
    return settings.load(flags, file)


def _serve(args: argparse.Namespace) -> int:
    try:
        config = _load(args)
        start_logging(config.log_level, "supervisor")
        config, model_config, model_dir, pool = _prepare(config)
        return _run(config, model_config, model_dir, pool)
    except (ConfigError, ModelError, SegmentError) as e:
        print(f"llumd: {e}", file=sys.stderr)
        return EXIT_CONFIG


def _check(args: argparse.Namespace) -> int:
    try:
        config, model_config, _, pool = _prepare(_load(args))
    except (ConfigError, ModelError) as e:
        print(f"llumd: {e}", file=sys.stderr)
        return EXIT_CONFIG
    n = len(config.devices)
    kv = "KV in what their GPUs have free" if config.on_gpus else f"{pool >> 20} MiB of KV each"
    print(f"{model_config.name}: {n} engine{'s' if n > 1 else ''}, {kv}; settings are fine")
    return 0


def _options(_args: argparse.Namespace) -> int:
    print("| option | default | unit | meaning |\n|---|---|---|---|")
    defaults = Config()
    for option in settings.options():
        unit, gpu = option.metadata["unit"], option.metadata["gpu"]
        shown = _default(getattr(defaults, option.name), unit)
        default = f"`{shown}`" if shown else ""
        if gpu is not None:
            default += f"; GPUs: `{_default(gpu, unit)}`"
        meaning = option.metadata["meaning"].replace("|", "\\|")
        print(f"| `{option.name}` | {default} | {unit} | {meaning} |")
    return 0


def _build_kernels(args: argparse.Namespace) -> int:
    from daemon.engine.cuda import compile as kernel_compiler
    from daemon.engine.cuda import kernels

    try:
        archs = {kernels.parse_arch(args.arch)} if args.arch else set(kernels.gpu_archs())
        if not archs:
            raise kernels.KernelError("no GPU is seen here; name the architecture to compile for: --arch 9.0a")
        model_dir = store.resolve(args.model, "auto", _say)
        model_config = read_model_config(model_dir, load_format="dummy")  # what is compiled depends on no weight
        for arch in sorted(archs):
            specs = kernels.required(
                model_config, arch=arch, dtype=args.dtype, kv_dtype=args.kv_dtype, prefill=args.prefill
            )
            kernel_compiler.build(specs, arch, kernels.directory(arch), _say, jobs=args.jobs)
            print(f"{len(specs)} kernels for {model_config.name} on {arch} are in {kernels.directory(arch)}")
    except (kernels.KernelError, ModelError) as e:
        print(f"llumd: {e}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _list_kernels(_args: argparse.Namespace) -> int:
    from daemon.engine.cuda import kernels

    root = kernels.kernels_dir()
    found = kernels.listing(root)
    if not found:
        print(f"no compiled kernels in {root}; llumd kernels build makes them")
    for where, modules in found.items():
        print(where)
        for built in modules:
            print(f"  {built.size / 2**20:6.1f} MiB  nvcc {built.nvcc}  {built.name}")
    return 0


def _default(value: object, unit: str) -> str:
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if unit == "bytes" and isinstance(value, int) and value:
        return f"{value >> 20}MiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _prepare(config: Config) -> tuple[Config, ModelConfig, Path, int]:
    """Everything that can be refused is refused here, before a process or a segment exists."""
    config = dataclasses.replace(config, devices=config.devices or devices.find(config, _say))
    config = config.for_gpus() if config.on_gpus else config
    config.check()
    if config.api_key_file:
        from daemon.api.auth import KeyRing

        KeyRing.load(Path(config.api_key_file))
    model_dir = store.resolve(config.model, config.load_format, _say)
    # The stub and hash engines compute nothing of the model; its tokenizer serves the frontends all the same.
    load_format = config.load_format if config.engine == "model" else "dummy"
    model_config = read_model_config(model_dir, config.served_name, load_format)
    check_tokenizer(model_dir)
    if config.on_gpus:
        devices.check_gpus(config, model_config)
    config = dataclasses.replace(config, served_name=model_config.name)
    return (
        config,
        model_config,
        model_dir,
        kv_pool_bytes(config, model_config, len(config.devices), _available_memory()),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run(config: Config, model_config: ModelConfig, model_dir: Path, pool: int) -> int:
    from daemon.supervisor.supervisor import Supervisor

    directory = settings.run_dir(config)
    lock = _lock(directory)
    try:
        http = _listen(config)
        config = dataclasses.replace(config, port=http.getsockname()[1])
        admin = _listen_admin(directory / "admin.sock")
        try:
            supervisor = Supervisor(config, str(model_dir), pool, http, admin)
            return supervisor.run(lambda: _announce(config, model_config, directory))
        finally:
            (directory / "admin.sock").unlink(missing_ok=True)
    finally:
        os.close(lock)


def _announce(config: Config, model_config: ModelConfig, directory: Path) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    n = len(config.devices)
    ctl = f" --run-dir {directory}" if config.run_dir else ""
    url = f"http://{host}:{config.port}"
    text = _EXAMPLE.format(name=model_config.name, url=url, engines=n, s="s" if n > 1 else "", ctl=ctl)
    print(text, flush=True)


def _lock(directory: Path) -> int:
    """Hold the run directory; the kernel lets go of it however we die."""
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ConfigError(f"run_dir: cannot use {directory}: {e.strerror}; choose another with --run-dir") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(
            f"run_dir: another llumd runs with {directory}; stop it, or choose another with --run-dir"
        ) from None
    return fd


def _listen(config: Config) -> socket.socket:
    """The one listening socket that all frontends share: a dying frontend loses no queued connection."""
    try:
        info = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        sock.listen(_BACKLOG)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(f"port: {config.port} on {config.host} is taken; choose another with --port") from None
        raise ConfigError(f"host: cannot listen on {config.host}:{config.port}: {e.strerror}") from None
    return sock


def _listen_admin(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # ours by the lock: a leftover of a daemon that was killed
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
