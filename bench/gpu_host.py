"""Host time of the CUDA engine's steps, with a CUDA runtime that does nothing.

    python -m tools.simgpu --launch-only -m bench.gpu_host [--json FILE] [--against CHECKOUT] [--dry-run]

Everything between a step's plan and its result runs as on a GPU: arrays, FlashInfer's schedules, launches or the
replay of a graph, and the copy of the tokens. Kernels take no time and calls of the runtime almost none, so the
result is the time of Python, PyTorch and FlashInfer on this machine's CPU. With overlap this time is hidden if it is
shorter than the device's step.

`--against`: the root of another revision's checkout. Both revisions run in turns, and the result is the median of the
ratios of all turns: on a busy machine trust only that. `--dry-run`: a tiny model on the CPU, to find errors in the
command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine, revisions, step_loads
from bench.gpu_model import LLAMA_8B, TINY
from bench.step_loads import Load

COMMAND = "-m tools.simgpu --launch-only -m bench.gpu_host"
# As many layers, heads and calls as an 8B model. The widths only matter to the device and are small.
SHAPE: dict[str, Any] = LLAMA_8B | {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 32000}
BLOCKS = 1400  # of the pool


class Scale(NamedTuple):
    """Sizes of the model and of the loads."""

    device: str
    shape: dict[str, Any]
    loads: tuple[Load, ...]
    rounds: int  # of a decode step; of one with a chunk a quarter


FULL = Scale(
    "cuda:0",
    SHAPE,
    (
        Load(1, 1024, 0),
        Load(8, 1024, 0),
        Load(64, 256, 0),
        Load(256, 60, 0),
        Load(0, 0, 20),
        Load(0, 0, 512),
        Load(0, 0, 2000),
        Load(64, 256, 2048),
    ),
    200,
)
DRY = Scale("cpu", TINY, (Load(2, 20, 0), Load(0, 0, 20), Load(2, 20, 20)), 4)


def measure(scale: Scale) -> dict[str, Any]:
    """Return the median microseconds of launch and collect, by step."""
    runner = step_loads.make_runner(scale.shape, scale.loads, device=scale.device, blocks=BLOCKS)
    return {
        load.name: _timed(runner, load, scale.rounds // 4 if load.chunk else scale.rounds) for load in scale.loads
    }


def _timed(runner: Any, load: Load, rounds: int) -> dict[str, float]:
    """Run the step `rounds` times; return the median microseconds of launch and of collect."""
    plan = step_loads.plan_of(load, BLOCKS)
    times: dict[str, list[float]] = {"launch_us": [], "collect_us": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        times[name].append((time.perf_counter() - start) * 1e6)
        return result

    for _ in range(rounds + 5):
        ticket = timed("launch_us", partial(runner.launch, plan))
        timed("collect_us", partial(runner.collect, ticket))
    return {name: statistics.median(values[5:]) for name, values in times.items()}


def compare(checkout: Path, turns: int) -> dict[str, Any]:
    """Run this revision and that of `checkout` in turns. Return the microseconds of both and the ratios, by step."""
    found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    with revisions.combined(checkout) as before:
        for _ in range(turns):
            for name, root in (("before", before), ("after", revisions.ROOT)):
                found[name].append(revisions.run_for_json(root, COMMAND)["steps"])
    steps: dict[str, Any] = {}
    for step in found["after"][0]:
        totals = {name: [sum(run[step].values()) for run in runs] for name, runs in found.items()}
        ratios = [after / before for before, after in zip(totals["before"], totals["after"], strict=True)]
        steps[step] = {f"{name}_us": statistics.median(values) for name, values in totals.items()}
        steps[step] |= {"ratio": statistics.median(ratios), "ratios": sorted(round(r, 3) for r in ratios)}
    return steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="compare with the revision in this directory"
    )
    parser.add_argument("--turns", type=int, default=5, help="runs of each revision (default 5)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(argv)
    facts = {"command": f"python {COMMAND}", "machine": machine.describe(), "versions": revisions.versions()}
    if args.against:
        steps = compare(args.against, args.turns)
        facts |= {"before": revisions.name_of(args.against), "after": revisions.name_of(revisions.ROOT)}
        print(f"{'step, launch and collect':<32}{'before us':>12}{'after us':>12}{'ratio':>8}  ratio of each turn")
        for name, row in steps.items():
            ratios = " ".join(f"{ratio:.2f}" for ratio in row["ratios"])
            print(f"{name:<32}{row['before_us']:>12.0f}{row['after_us']:>12.0f}{row['ratio']:>8.2f}  {ratios}")
    else:
        steps = measure(DRY if args.dry_run else FULL)
        print(f"{'step':<32}{'launch us':>12}{'collect us':>12}")
        for name, row in steps.items():
            print(f"{name:<32}{row['launch_us']:>12.0f}{row['collect_us']:>12.0f}")
    if args.json:
        args.json.write_text(json.dumps(facts | {"steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
