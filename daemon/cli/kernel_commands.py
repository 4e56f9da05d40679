"""The commands `llumd kernels ...`: build, list, pack and unpack."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from daemon.cli.commands import command
from daemon.cli.interrupts import EXIT_INTERRUPTED, interruptible
from daemon.cli.messages import print_progress, refuse
from daemon.engine.cuda import compile as kernel_compiler
from daemon.engine.cuda import driver, kernels
from daemon.models import store
from daemon.models.model_config import ModelError, read_model_config
from daemon.units import parse_whole, quoted

_MAX_JOBS = 1024


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `llumd kernels`."""
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
        type=_jobs,
        default=0,
        metavar="N",
        help="compilers that run at the same time (default: as many as fit)",
    )
    build.set_defaults(run=_build)
    commands.add_parser("list", help="list compiled kernels").set_defaults(run=_list)
    pack = commands.add_parser("pack", help="write compiled kernels to an archive, for machines without a compiler")
    pack.add_argument("file", type=Path, metavar="FILE", help="the archive to write: .tar.xz or .tar.gz")
    pack.add_argument(
        "--arch", action="append", default=[], metavar="9.0a", help="may be repeated (default: all that are compiled)"
    )
    pack.set_defaults(run=_pack)
    unpack = commands.add_parser("unpack", help="take the kernels of an archive")
    unpack.add_argument("file", type=Path, metavar="FILE", help="the archive to read")
    unpack.set_defaults(run=_unpack)


def _jobs(text: str) -> int:
    try:
        jobs = parse_whole(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    if not 0 <= jobs <= _MAX_JOBS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not allowed; it must be from 0 to {_MAX_JOBS}")
    return jobs


def _build(args: argparse.Namespace) -> int:
    try:
        with interruptible():
            _build_all(args)
    except (kernels.KernelError, ModelError) as e:
        return refuse(e)
    except KeyboardInterrupt:
        print("llumd: stopped; the kernels that are complete stay", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _build_all(args: argparse.Namespace) -> None:
    archs = {kernels.parse_arch(args.arch)} if args.arch else set(driver.survey().archs)
    if not archs:
        raise kernels.KernelError("no GPU is visible; name the architecture to compile for, for example --arch 9.0a")
    model_dir = store.resolve(args.model, "dummy", print_progress)  # kernels do not depend on weights
    model_config = read_model_config(model_dir, store.default_name(args.model))
    for arch in sorted(archs):
        specs = kernels.required(
            model_config, arch=arch, dtype=args.dtype, kv_dtype=args.kv_dtype, prefill=args.prefill
        )
        kernel_compiler.build(specs, arch, kernels.directory(arch), print_progress, jobs=args.jobs)
        print(f"{len(specs)} kernels of {model_config.name} for {arch} are in {kernels.directory(arch)}")


def _list(_args: argparse.Namespace) -> int:
    root = kernels.kernels_dir()
    found = kernels.listing(root)
    if not found:
        print(f"no compiled kernels in {root}; `{command('llumd')} kernels build` compiles them")
    for where, modules in found.items():
        print(where)
        for built in modules:
            print(f"  {built.size / 2**20:6.1f} MiB  nvcc {built.nvcc}  {built.name}")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from daemon.engine.cuda import archive

    try:
        archs = {kernels.parse_arch(arch) for arch in args.arch}
        number = archive.pack(args.file, archs, print_progress)
        size = args.file.stat().st_size / 2**20
    except kernels.KernelError as e:
        return refuse(e)
    print(
        f"{number} kernels are in {args.file}, {size:.1f} MiB; `llumd kernels unpack` takes them on another machine"
    )
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from daemon.engine.cuda import archive

    try:
        number = archive.unpack(args.file, print_progress)
    except kernels.KernelError as e:
        return refuse(e)
    print(f"{number} new kernels are in {kernels.kernels_dir()}")
    return 0
