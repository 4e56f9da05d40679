"""Kernels, copies and bytes of a step of the CUDA engine, counted on the simulated CUDA runtime.

    python -m tools.simgpu --launch-only -m bench.gpu_launches [--json FILE]
    python -m bench.gpu_launches --against CHECKOUT [--json FILE]

The model is a Llama-3.1-8B in shape. Models of one and of two layers are counted; the difference is what a layer
adds, and 32 layers follow from it. The counts are what a GPU would get, except that cuBLAS may split a product into
two kernels. Bytes and times are estimates from the shapes (bench/launch_costs.py), at the rates that one H100
reached. `--against`: also count the revision in the directory CHECKOUT. `--dry-run`: a tiny model on the CPU, where
each operation counts as a kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import machine, revisions, step_loads
from bench.gpu_model import LLAMA_8B, TINY
from bench.launch_costs import Call, costs, is_product, weight_of
from bench.step_loads import Load

if TYPE_CHECKING:
    from bench.launch_recorder import Recorder, Step

COMMAND = "-m tools.simgpu --launch-only -m bench.gpu_launches"
BANDWIDTH, RATE = 3.01e12, 771e12  # bytes/s of a copy, FLOP/s of a product: docs/gpu.md
MULTIPROCESSORS = 132  # of an H100, and of the simulated GPU
BLOCKS = 400  # of the pool. Nothing is computed, so the sequences may share them.
STEPS = (Load(1, 1024, 0), Load(8, 1024, 0), Load(64, 1024, 0), Load(256, 1024, 0), Load(64, 1024, 2048))
DRY_STEPS = (Load(1, 20, 0), Load(4, 20, 20))


class Row(NamedTuple):
    """The launches of one kernel in a step. `node`: it is replayed by a graph."""

    calls: float
    nbytes: float
    flop: float
    seconds: float

    def plus(self, other: Row, times: float = 1.0) -> Row:
        return Row(*(a + times * b for a, b in zip(self, other, strict=True)))


NOTHING = Row(0.0, 0.0, 0.0, 0.0)
Rows = dict[tuple[str, bool], Row]  # by kernel, and whether a graph replays it


def count(*, dry: bool) -> dict[str, Any]:
    """Return the counts of all steps, by step."""
    from bench.launch_recorder import Recorder

    shape, loads = (TINY, DRY_STEPS) if dry else (LLAMA_8B, STEPS)
    with Recorder(dry=dry) as recorder:
        one, two = (_of_layers(shape, layers, loads, recorder, dry) for layers in (1, 2))
    found = {}
    for load in loads:
        (rows, replays), (more, _) = one[load.name], two[load.name]
        names = sorted({*rows, *more})
        extra = shape["num_hidden_layers"] - 1
        layer = {name: more.get(name, NOTHING).plus(rows.get(name, NOTHING), -1.0) for name in names}
        found[load.name] = _summary(
            {name: rows.get(name, NOTHING).plus(layer[name], extra) for name in names}, replays
        )
    return found


def _of_layers(
    shape: dict[str, Any], layers: int, loads: Sequence[Load], recorder: Recorder, dry: bool
) -> dict[str, tuple[Rows, int]]:
    """Return the rows and the number of replayed graphs of each step, for a model of `layers` layers."""
    shape = shape | {"num_hidden_layers": layers}
    runner = step_loads.make_runner(shape, loads, device="cpu" if dry else "cuda:0", blocks=BLOCKS)
    return {load.name: _rows_of(_recorded(runner, load, recorder), load) for load in loads}


def _recorded(runner: Any, load: Load, recorder: Recorder) -> Step:
    plan = step_loads.plan_of(load, BLOCKS)
    runner.execute(plan)  # the first step of a kind may prepare something
    recorder.take()
    runner.execute(plan)
    return recorder.take()


def _rows_of(step: Step, load: Load) -> tuple[Rows, int]:
    rows: Rows = {}
    for call in step.calls:
        for launch, cost in zip(call.launches, costs(call, load, 2 * MULTIPROCESSORS), strict=True):
            name = (_name(call, launch.name) if launch.kind == "kernel" else launch.kind, call.captured)
            seconds = cost.seconds(BANDWIDTH, RATE) if launch.kind == "kernel" else 0.0
            rows[name] = rows.get(name, NOTHING).plus(Row(1.0, cost.nbytes, cost.flop, seconds))
    return rows, step.replays


def _name(call: Call, kernel: str) -> str:
    """Return a kernel's name without template arguments. A product has the shape of its weight beside it, an
    operation of PyTorch the operation's name."""
    short = re.sub(r"[(<].*", "", re.sub(r"^void |\(anonymous namespace\)::", "", _demangled(kernel)))
    short = short.rpartition("::")[2] or kernel
    if is_product(call):
        return f"{short} {'x'.join(map(str, sorted(weight_of(call).shape)))}"
    if kernel == call.name:
        return kernel
    if call.name.startswith("aten."):
        return f"{short}, {call.name.removeprefix('aten.')}"
    return f"{short}, {call.name}" if short == "gemv_kernel" else short


def _demangled(name: str) -> str:
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    return (demangle(name.encode(), None, None, None) or name.encode()).decode()


def _summary(rows: Rows, replays: int) -> dict[str, Any]:
    kernels = {key: row for key, row in rows.items() if key[0] not in ("copy", "fill")}
    launched = [row for (_, node), row in kernels.items() if not node]
    return {
        "graph_launches": replays,
        "graph_nodes": _calls(row for (_, node), row in rows.items() if node),
        "kernel_launches": _calls(launched),
        "copies": _calls(row for (name, node), row in rows.items() if name == "copy" and not node),
        "fills": _calls(row for (name, node), row in rows.items() if name == "fill" and not node),
        "copied_bytes": round(sum(row.nbytes for (name, _), row in rows.items() if name == "copy")),
        "kernels_on_device": _calls(kernels.values()),
        "estimate": {
            "bytes": round(sum(row.nbytes for row in kernels.values())),
            "flop": round(sum(row.flop for row in kernels.values())),
            "ms": sum(row.seconds for row in kernels.values()) * 1e3,
        },
        "kernels": [
            {
                "kernel": name,
                "in_graph": node,
                "calls": round(row.calls),
                "estimate": {"bytes": round(row.nbytes), "flop": round(row.flop), "us": row.seconds * 1e6},
            }
            for (name, node), row in sorted(kernels.items(), key=lambda item: -item[1].seconds)
        ],
    }


def _calls(rows: Iterable[Row]) -> int:
    return round(sum(row.calls for row in rows))


# -- report


def table(revisions_of: dict[str, dict[str, Any]]) -> str:
    """Return a table of the steps and their kernels, with columns for each revision."""
    names = list(revisions_of)
    head = f"{'step, kernel':<52}"
    calls = ["calls"] if len(names) == 1 else [f"calls {name}" for name in names]
    lines = [head + "".join(f"{title:>18}{'est. MB':>10}{'est. us':>10}" for title in calls)]
    for step in revisions_of[names[-1]]:
        found = [revisions_of[name][step] for name in names]
        lines += ["", f"{step:<52}" + "".join(_cells(one["kernels_on_device"], one["estimate"]) for one in found)]
        for what in ("graph_launches", "graph_nodes", "kernel_launches", "copies", "fills"):
            lines.append(f"  {what.replace('_', ' '):<50}" + "".join(f"{one[what]:>18}{'':>20}" for one in found))
        by_kernel = [_by_kernel(one) for one in found]
        for kernel in dict.fromkeys(kernel for one in reversed(by_kernel) for kernel in one):
            lines.append(f"  {kernel[:50]:<50}" + "".join(_cells(*one.get(kernel, (0, {}))) for one in by_kernel))
    return "\n".join(lines)


def _by_kernel(step: dict[str, Any]) -> dict[str, tuple[int, dict[str, float]]]:
    """Return calls and estimates of each kernel, in graphs and outside."""
    found: dict[str, tuple[int, dict[str, float]]] = {}
    for row in step["kernels"]:
        calls, estimate = found.get(row["kernel"], (0, {}))
        total = {key: estimate.get(key, 0.0) + value for key, value in row["estimate"].items()}
        found[row["kernel"]] = (calls + row["calls"], total)
    return found


def _cells(calls: int, estimate: dict[str, float]) -> str:
    us = estimate.get("us", estimate.get("ms", 0.0) * 1e3)
    return f"{calls:>18}{estimate.get('bytes', 0) / 1e6:>10,.1f}{us:>10,.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="also count the revision in this directory")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(argv)
    facts = {
        "command": f"python {COMMAND}",
        "machine": machine.describe(),
        "versions": revisions.versions(),
        "estimates": {"bytes_per_second": BANDWIDTH, "flop_per_second": RATE, "formulas": "bench/launch_costs.py"},
    }
    if args.against:
        with revisions.combined(args.against) as before:
            found = {"before": revisions.run_for_json(before, COMMAND)["steps"]}
        found |= {"after": revisions.run_for_json(revisions.ROOT, COMMAND)["steps"]}
        facts["revisions"] = {"before": revisions.name_of(args.against), "after": revisions.name_of(revisions.ROOT)}
    else:
        found = {"steps": count(dry=args.dry_run)}
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(facts | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
