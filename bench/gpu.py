"""Benchmark of the CUDA engine on one machine: all figures in one command, with their targets.

    python -m bench.gpu --out DIR [--only decode,prefill] [--limit SECONDS] [--dry-run [DEVICE]]

The model is a Llama of 8 billion random weights. A section uses one GPU unless it needs more. Each section is a
separate process; bench/README.md describes what each one measures. `--dry-run` uses a tiny model, on the CPU unless a
device is named, to find errors in the command itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import machine, roofline
from bench.gpu_model import LLAMA_8B, TINY, model_config_of, write_model
from bench.sections import Figure, Outcome, append_figure, run_all, run_section, table
from daemon.models.model_config import ModelConfig

if TYPE_CHECKING:
    from bench.gpu_peaks import Peaks  # sections import torch, in processes of their own

DECODE_BAR = 0.80  # share of the least time of a step, at the measured bandwidth and matmul rate
BARRED_BATCHES = (1, 64, 256)
PREFILL_BAR = 0.70  # share of the measured matmul rate, at 2048 tokens
IDLE_BAR = 0.05  # share of a step
PAUSE_BAR = 2.0  # decode steps
PACKAGES = ("torch", "flashinfer-python", "apache-tvm-ffi", "transformers", "numpy")


class Scale(NamedTuple):
    """Sizes of the model and of the loads."""

    config: dict[str, Any]
    device: str
    batches: tuple[int, ...]
    steps: int
    context: int
    prompts: tuple[int, ...]  # of prefill
    some: tuple[int, ...]  # batches for which options are compared
    matrix: int
    copy_bytes: int
    kv_blocks: int  # of the pool; 0: all free memory (on the CPU it must be set)
    offline: tuple[int, int, int]  # prompts, their tokens, output tokens
    loads: tuple[tuple[int, int], ...]  # over HTTP: requests in flight, requests
    served: tuple[int, int]  # prompt and output tokens
    moved: tuple[int, ...]  # tokens of the requests that move
    moves: int
    pushes: tuple[int, ...]  # blocks


FULL = Scale(
    LLAMA_8B,
    "cuda:0",
    (1, 8, 32, 64, 128, 256),
    60,
    1024,
    (512, 2048, 8192),
    (1, 64, 256),
    8192,
    4 << 30,
    0,
    (64, 1024, 128),
    ((1, 8), (64, 192), (256, 512)),
    (512, 128),
    (1024, 4096),
    6,
    (64, 512, 4096),
)
DRY = Scale(
    TINY,
    "cpu",
    (1, 8),
    6,
    64,
    (64, 200),
    (1, 4),
    256,
    1 << 20,
    200,
    (4, 40, 6),
    ((1, 2), (4, 8)),
    (20, 8),
    (64,),
    2,
    (4,),
)


class Section(NamedTuple):
    budget: float  # seconds
    run: Callable[[Context], None]
    needs_gpu: bool = False


class Context(NamedTuple):
    """Arguments of a section: the scale, the output directory with results of earlier sections, and `report`."""

    name: str
    scale: Scale
    out: Path
    report: Callable[[Figure], None]

    def figure(
        self, what: str, value: float, unit: str, bar: float | None = None, *, at_most: bool = False, **more: Any
    ) -> None:
        bar = None if self.scale.config is TINY else bar  # a dry run has no targets
        self.report(Figure(self.name, what, value, unit, bar, at_most, more))

    @property
    def model_config(self) -> ModelConfig:
        return model_config_of(self.scale.config, self.out / "shape")

    def model(self) -> Path:
        """Write the model as a daemon serves it, and return its directory."""
        return write_model(self.scale.config, self.out / "model")

    def peaks(self) -> Peaks:
        """Return the peaks of the device. Call it before anything else takes the device's memory."""
        from bench.gpu_peaks import peaks

        return peaks(self.out / "peaks.json", self.scale.device, self.scale.copy_bytes, self.scale.matrix)


# -- sections


def device_facts(c: Context) -> None:
    (c.out / "peaks.json").unlink(missing_ok=True)
    bandwidth, rate = c.peaks()
    c.figure("copy on the device, read and write", bandwidth / 1e9, "GB/s")
    c.figure(f"matrix product, {c.scale.matrix} cubed", rate / 1e12, "TFLOP/s")


def decode(c: Context, **options: Any) -> None:
    """Measure decodes: every batch with graphs and overlap, some batches without one or both."""
    from bench import gpu_steps

    made, peaks = _made(c, **options), c.peaks()
    began = time.perf_counter()
    runner = gpu_steps.make_runner(c.model_config, made)
    c.figure("loaded and captured in", time.perf_counter() - began, "s", blocks=runner.num_blocks)
    for rows, path_seconds in sorted(runner.path_seconds.items()):
        for path, seconds in path_seconds.items():
            c.figure(f"{path}, {rows} of context 1", seconds * 1e3, "ms")
    batches = c.scale.some if options else c.scale.batches
    for batch in batches:
        _decode(c, runner, made, peaks, batch, overlap=True, graphs=True)
    for batch in () if options else c.scale.some:
        for overlap, graphs in ((False, True), (True, False), (False, False)):
            _decode(c, runner, made, peaks, batch, overlap=overlap, graphs=graphs)


def _decode(c: Context, runner: Any, made: Any, peaks: Peaks, batch: int, *, overlap: bool, graphs: bool) -> None:
    from bench import gpu_steps

    scale = c.scale
    steps = gpu_steps.decode(runner, made, batch, scale.context, scale.steps, overlap=overlap, graphs=graphs)
    least = roofline.decode_seconds(
        c.model_config,
        batch,
        scale.context,
        bandwidth=peaks.bandwidth,
        rate=peaks.rate,
        kv_item_bytes=1 if made.kv_dtype == "fp8" else roofline.BF16,
    )
    best = overlap and graphs
    idle = steps.idle / (steps.idle + steps.busy)
    name = f"batch {batch}" + ("" if overlap else ", no overlap") + ("" if graphs else ", no graphs")
    c.figure(
        name,
        batch / steps.step,
        "tok/s",
        DECODE_BAR * batch / least if best and batch in BARRED_BATCHES else None,
        ms=steps.step * 1e3,
        roofline=least / steps.step,
        device_ms=steps.busy * 1e3,
        idle_us=steps.idle * 1e6,
    )
    if best:
        c.figure(f"{name}: device idle between steps", idle, "of step", IDLE_BAR, at_most=True)


def prefill(c: Context, **options: Any) -> None:
    from bench import gpu_steps

    made, peaks = _made(c, **options), c.peaks()
    runner = gpu_steps.make_runner(c.model_config, made._replace(max_num_seqs=8))
    for tokens in c.scale.prompts:
        seconds = gpu_steps.prefill(runner, made, tokens, 7)
        share = roofline.prefill_flop(c.model_config, tokens) / seconds / peaks.rate
        c.figure(
            f"{tokens} tokens",
            share,
            "of rate",
            PREFILL_BAR if tokens == 2048 else None,
            ms=seconds * 1e3,
            tokens_per_second=tokens / seconds,
        )


def mixed(c: Context) -> None:
    """Measure chunks alone, and steps of decodes and a chunk, in one pass and in two."""
    from bench import gpu_mixed

    gpu_mixed.measure(_made(c), c.out / "mixed", c.figure, dry=c.scale.config is TINY)


def offline(c: Context) -> None:
    """Run prompts through the real scheduler and pipeline. All of them are queued at the start."""
    from bench import gpu_steps

    made, (count, length, output) = _made(c), c.scale.offline
    runner = gpu_steps.make_runner(c.model_config, made._replace(max_num_seqs=count))
    prompts = gpu_steps.random_prompts(count, length, c.model_config.vocab_size)
    for overlap in (True, False):
        gpu_steps.offline(runner, made, prompts[:2], 4, overlap=overlap)
        served = gpu_steps.offline(runner, made, prompts, output, overlap=overlap)
        name = f"{count} x {length}+{output}" + ("" if overlap else ", no overlap")
        c.figure(name, served.output_tokens / served.seconds, "tok/s", seconds=served.seconds)
        c.figure(f"{name}: device idle", served.idle_share, "of step", IDLE_BAR if overlap else None, at_most=True)


def transformers(c: Context) -> None:
    """Run the prompts of `offline` by Transformers."""
    from bench import gpu_peer, gpu_steps

    count, length, output = c.scale.offline
    model = gpu_peer.model_of(c.scale.config, c.scale.device)
    prompts = gpu_steps.random_prompts(count, length, c.model_config.vocab_size)
    failures = []
    for name, run in (("static batch", gpu_peer.static), ("continuous batching", gpu_peer.continuous)):
        try:
            seconds, tokens = run(model, prompts, output)
        except Exception as e:
            failures.append(f"{name}: {e!r}")
        else:
            c.figure(f"{name}, {count} x {length}+{output}", tokens / seconds, "tok/s", seconds=seconds)
    if failures:
        raise RuntimeError("; ".join(failures))


def kernels(c: Context) -> None:
    """Measure single kernels: attention by plan, layout and dtype; products by library; the small ones."""
    from bench import gpu_kernels as measure

    _use_kernels(c)
    config, device = c.model_config, c.scale.device

    def report(found: measure.KernelTime) -> None:
        more: dict[str, Any] = {"tb_per_second": found.terabytes}
        if found.flop:
            more["tflops"] = found.teraflops
        c.report(Figure(c.name, found.what, found.us, "us", more=more))

    for case in measure.attention_cases(c.scale.context, c.scale.some, config.num_layers):
        report(measure.attention(config, device, case))
    for found in measure.products(config, device, c.scale.some):
        report(found)
    for found in measure.small_kernels(config, device, (*c.scale.some, c.scale.prompts[-1])):
        report(found)


def profile(c: Context) -> None:
    """Measure the kernels of decode steps and of a prefill chunk inside the runner."""
    from bench import gpu_profile, gpu_steps

    made = _made(c)
    runner = gpu_steps.make_runner(c.model_config, made)
    found = {f"batch {n}": gpu_profile.decode(runner, made, n, c.scale.context) for n in c.scale.some}
    tokens = c.scale.prompts[1]
    found[f"prefill {tokens}"] = gpu_profile.prefill(runner, made, tokens)
    for step, shares in found.items():
        c.figure(f"{step}: all kernels", sum(share.us for share in shares), "us")
        for share in shares[:12]:
            c.figure(f"{step}: {share.name}", share.us, "us", calls=share.calls)


def products(c: Context) -> None:
    from bench.gpu_products import measure

    for found in measure(c.model_config, _made(c), c.scale.batches, dry=c.scale.config is TINY):
        c.report(Figure(c.name, found.what, found.value, found.unit, more=found.more))


def _use_kernels(c: Context) -> None:
    """Make FlashInfer load the compiled kernels. Call it before FlashInfer's first import."""
    import torch

    from daemon.engine.cuda import kernels as compiled

    torch.cuda.set_device(c.scale.device)
    compiled.use(compiled.directory(compiled.arch_of(*torch.cuda.get_device_capability(c.scale.device))))


def copies(c: Context) -> None:
    from bench.gpu_live import copy_rates

    block = 16 * roofline.kv_bytes(c.model_config)
    for there in [c.scale.device, *_gpus()[1:2]]:
        for found in copy_rates(c.scale.device, there, block, c.scale.pushes):
            if "open_seconds" in found:
                c.figure(f"map a pool of {found['gib']:.0f} GiB on {there}", found["open_seconds"] * 1e3, "ms")
                continue
            c.figure(
                f"{found['blocks']} {found['how']} blocks to {there}",
                found["gb_per_second"],
                "GB/s",
                ms=found["seconds"] * 1e3,
            )


def moves(c: Context) -> None:
    from bench.gpu_live import moves as measure

    for row in measure(
        c.model(), _daemon_flags(c, two=True), c.scale.moved, c.scale.moves, c.model_config.vocab_size
    ):
        for how in ("live", "blocking", "recompute"):
            found = row[how]
            c.figure(
                f"{how}, {row['prompt_tokens']} tokens: pause",
                found["pause_steps"],
                "steps",
                PAUSE_BAR if how == "live" else None,
                at_most=True,
                ms=found["pause"] * 1e3,
                worst_ms=found["pause_max"] * 1e3,
                itl_ms=row["itl"] * 1e3,
                mb=found["bytes"] / 1e6,
            )


def served(c: Context) -> None:
    from bench.gpu_live import served as measure

    def report(run: dict[str, Any]) -> None:
        times = {f"{name}_{p}_ms": run[name][p] * 1e3 for name in ("ttft", "itl_token") for p in ("p50", "p99")}
        client = run["client_cpu_seconds"] / run["seconds"]  # near 1 the client limits the rate
        c.figure(run["load"], run["output_tokens_per_second"], "tok/s", client_cpu=client, **times)

    prompt, output = c.scale.served
    measure(c.model(), _daemon_flags(c, two=False), c.scale.loads, prompt, output, c.model_config.vocab_size, report)


SECTIONS: dict[str, Section] = {
    "device": Section(90, device_facts),
    "decode": Section(110, decode),
    "prefill": Section(45, prefill),
    "mixed": Section(60, mixed),
    "kernels": Section(60, kernels, needs_gpu=True),
    "profile": Section(45, profile),
    "products": Section(40, products, needs_gpu=True),
    "offline": Section(60, offline),
    "copies": Section(40, copies, needs_gpu=True),
    "moves": Section(130, moves),
    "http": Section(110, served),
    "page32": Section(45, partial(decode, block_size=32)),
    "e4m3": Section(45, partial(decode, kv_dtype="fp8")),
    "fa3": Section(45, partial(prefill, prefill="fa3")),
    "transformers": Section(90, transformers),
}


def _made(c: Context, **options: Any) -> Any:
    from bench.gpu_steps import RunnerOptions

    scale = c.scale
    longest = max(*scale.prompts, scale.context + scale.steps, sum(scale.offline[1:])) + 16
    made = RunnerOptions(scale.device, max(scale.batches), max(scale.prompts), longest, kv_blocks=scale.kv_blocks)
    return made._replace(**options)


def _gpus() -> list[str]:
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _daemon_flags(c: Context, *, two: bool) -> list[str]:
    """Return the flags of a daemon on all GPUs, or, for moves, with two engines on two GPUs or on one."""
    if c.scale.device == "cpu":
        return ["--devices", "cpu,cpu" if two else "cpu", "--kv-memory", "16MiB"]
    gpus = _gpus()
    chosen = (gpus * 2 if len(gpus) == 1 else gpus)[:2] if two else gpus
    size = "16MiB" if c.scale.config is TINY else "12GiB"
    memory = ["--kv-memory", size, "--max-num-seqs", "32"] if two else []
    length = max(c.scale.moved) + 3100 if two else sum(c.scale.served) + 16
    return ["--devices", ",".join(chosen), "--max-model-len", str(length), *memory]


# -- the command


def _scale(dry: str) -> Scale:
    return DRY._replace(device=dry) if dry else FULL


def _run_one(name: str, dry: str, out: Path) -> None:
    """Run a section in its own process."""
    file = out / f"{name}.figures"

    def report(figure: Figure) -> None:
        append_figure(file, figure)
        print(table([Outcome(name, 0.0, "", [figure])]).split("\n")[1], flush=True)

    section, scale = SECTIONS[name], _scale(dry)
    if section.needs_gpu and scale.device == "cpu":
        raise RuntimeError("this section needs a GPU")
    section.run(Context(name, scale, out, report))


def _run_child(dry: str, out: Path, name: str, budget: float) -> Outcome:
    print(f"{name} ...", flush=True)
    figures = out / f"{name}.figures"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu", "--section", name, "--out", str(out)]
    command += ["--dry-run", dry] if dry else []
    return run_section(name, command, budget, figures, out / f"{name}.log")


def _print_outcome(outcome: Outcome) -> None:
    print(table([outcome]).partition("\n")[2] or "(nothing)", flush=True)
    print(f"  {outcome.section}: {outcome.seconds:.0f} s", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json, logs and models")
    p.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}; `device` always runs first")
    p.add_argument("--limit", type=float, default=530.0, help="seconds for all sections together")
    p.add_argument(
        "--dry-run",
        nargs="?",
        const="cpu",
        default="",
        metavar="DEVICE",
        help="a tiny model, on the CPU unless a device is named",
    )
    p.add_argument("--write-model", type=Path, metavar="DIR", help="only write the model, to build its kernels for")
    p.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    p.add_argument("--hold-pool", nargs=2, metavar=("DEVICE", "BYTES"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        p.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    args.names = [name for name in SECTIONS if name in wanted or name == "device"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. The exit status is 1 if a section failed; a missed target is not a failure."""
    args = _arguments(argv)
    if args.hold_pool:
        from bench.gpu_live import hold_pool

        hold_pool(args.hold_pool[0], int(args.hold_pool[1]))
        return 0
    if args.write_model:
        print(write_model(LLAMA_8B, args.write_model))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.absolute()
    if args.section:
        _run_one(args.section, args.dry_run, out)
        return 0
    facts = machine.environment(PACKAGES)
    print(json.dumps(facts["machine"] | facts["versions"]), flush=True)
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        result = facts | {"dry_run": bool(args.dry_run), "sections": [asdict(o) for o in outcomes]}
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        _print_outcome(outcome)

    budgets = {name: section.budget for name, section in SECTIONS.items()}
    run_all(args.names, budgets, args.limit, partial(_run_child, args.dry_run, out), report)
    print("\n" + table(outcomes))
    return int(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
