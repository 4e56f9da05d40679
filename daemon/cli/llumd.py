"""The `llumd` command: `serve`, `check`, `models`, `pull`, `rm`, `options` and `kernels`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daemon import __version__
from daemon import config as settings
from daemon.api.key_file import read_key_file
from daemon.cli import kernel_commands, model_commands, model_report
from daemon.cli.claims import Claims, claimed
from daemon.cli.commands import command
from daemon.cli.messages import print_progress, refuse
from daemon.cli.model_commands import MODEL_HELP
from daemon.cli.prepare import Prepared, prepare
from daemon.config import Config, ConfigError
from daemon.ipc import output
from daemon.ipc.child import EXIT_FAILED, start_logging
from daemon.machine import available_memory, raise_descriptor_limit
from daemon.models.locks import in_use
from daemon.models.model_config import ModelConfig, ModelError
from daemon.option import allowed
from daemon.supervisor.start_error import StartError
from daemon.supervisor.systemd import Notifier
from daemon.units import format_value, quoted

if TYPE_CHECKING:
    from daemon.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

_REFUSALS = (ConfigError, ModelError, StartError, OSError)
_BACKLOG = 4096
_ADMIN_BACKLOG = 64
_EXAMPLE = """\
llumd serves {name} at {url}
  {engines} engine{s} ready; for example:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{name}", "temperature": 0,
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  {ctl} top"""


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
    check.add_argument("--json", action="store_true", help="print what the model is and needs as JSON")
    check.set_defaults(run=_check)
    model_commands.add_to(commands)
    table = commands.add_parser("options", help="print all options as a Markdown table")
    table.set_defaults(run=_options)
    kernel_commands.add_to(commands.add_parser("kernels", help="compile, list, pack or unpack the kernels of GPUs"))
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_", nargs="?", metavar="MODEL", help=MODEL_HELP)
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
    if args.model_ is not None and flags.setdefault("model", args.model_) != args.model_:
        both = f"{quoted(args.model_)} and --model {quoted(flags['model'])}"
        raise ConfigError(f"model (command line): {both} differ; give one of them")
    file = args.config or (Path("/etc/llumd/config.toml") if Path("/etc/llumd/config.toml").exists() else None)
    return settings.load(flags, file)


def _serve(args: argparse.Namespace) -> int:
    output.tolerate_loss()
    _await_signals()
    raise_descriptor_limit()
    notifier = Notifier()
    try:
        config = _load(args)
        start_logging(config.log_level, "supervisor")
        with claimed(config) as claims:
            with notifier.start_extended():
                prepared = prepare(config, print_progress)
            with in_use(prepared.model_dir):
                return _run(claims, prepared, notifier)
    except _REFUSALS as e:
        return refuse(e)
    except KeyboardInterrupt:
        print("llumd: stopped by a signal before any process was started", file=sys.stderr)
        return 0


def _await_signals() -> None:
    """Until the supervisor handles signals, let SIGTERM end the start as Ctrl-C does, and a closed terminal not."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, lambda *_: None)


def _check(args: argparse.Namespace) -> int:
    try:
        config = _load(args)
        with claimed(config, on_trial=True):
            pass  # held for a moment only: a daemon may start while the model is checked
        prepared = prepare(config, print_progress, on_trial=True)
        report = model_report.describe(prepared, available_memory())
    except _REFUSALS as e:
        return refuse(e)
    if args.json:
        print(model_report.to_json(report))
        return 0
    print("\n".join(model_report.lines(report)))
    n, on_gpus = report.engines, prepared.config.on_gpus
    pool = f"{prepared.pool_bytes >> 20} MiB of KV cache each"
    kv = "KV cache in the free memory of the GPUs" if on_gpus else pool
    print(f"{n} engine{'s' if n > 1 else ''}, {kv}; the settings are valid")
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


def _run(claims: Claims, prepared: Prepared, notifier: Notifier) -> int:
    """Run the supervisor until it ends. Return the exit code. Raises OSError and StartError."""
    from daemon.supervisor.key_reload import KeySource
    from daemon.supervisor.supervisor import Supervisor

    config, model_config, model_dir, pool_bytes, keys, _ = prepared
    config = dataclasses.replace(config, port=claims.http.getsockname()[1])
    _listen(claims, config)
    n = len(config.devices)
    print_progress(f"starting {n} engine{'s' if n > 1 else ''} of {model_config.name} on {', '.join(config.devices)}")
    key_source = KeySource(keys, lambda: read_key_file(Path(config.api_key_file))) if keys else None
    supervisor = Supervisor(config, str(model_dir), pool_bytes, claims.http, claims.admin, key_source, notifier)
    return _supervise(supervisor, lambda: _announce(config, model_config, claims.directory))


def _listen(claims: Claims, config: Config) -> None:
    """Listen on both sockets. From now on clients can connect; they wait until a frontend accepts."""
    try:
        claims.http.listen(_BACKLOG)
        claims.admin.listen(_ADMIN_BACKLOG)
    except OSError as e:  # another process has bound the same port and was the first to listen
        raise ConfigError(
            f"port: cannot listen on {config.host}:{config.port}: {e.strerror}; choose another port with --port"
        ) from None


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
    ctl = f" --run-dir {shlex.quote(str(directory))}" if config.run_dir else ""
    url = f"http://{host}:{config.port}"
    ctl = command("llumctl") + ctl
    text = _EXAMPLE.format(name=model_config.name, url=url, engines=n, s="s" if n > 1 else "", ctl=ctl)
    print(text, flush=True)


if __name__ == "__main__":
    main()
