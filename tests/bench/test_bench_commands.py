"""Every benchmark answers `--help` and can run: once, as small as it can, so that none breaks unseen.

The list comes from the folder: a new benchmark without a dry run here is a failure.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bench
from bench import gpu
from bench.live import serving
from tests.models.tiny_model import make_tiny_llama

FOLDER = Path(bench.__file__).parent
ROOT = FOLDER.parent

# Arguments of the smallest run, by benchmark. {out}: an empty folder. {model}: the directory of a tiny model.
IN_PROCESS = {  # all of them import PyTorch: one import serves them all
    "engine": "--model {model} --repeat 1 --out {out}/result.json",
    "gpu": "--section device --dry-run --out {out}",
    "gpu_host": "--dry-run --json {out}/result.json",
    "gpu_launches": "--dry-run --json {out}/result.json",
    "sampler": "1 --repeat 1",
    "step_arrays": "--rows 4 --blocks 2",
    "transformers_static": "{model} --concurrency 2 --requests 2 --output-tokens 3 --json {out}/result.json",
}
PROCESSES = {  # they fork, or run a section in a process of its own
    "control": "--rounds 20 --json {out}/result.json",
    "first_minute": "--dry-run cpu --only device --limit 100 --out {out}",
}
DAEMONS = {  # they start a daemon, of stub engines
    "frontend": "--seconds 0.2 --connections 2 --engines 1 --json {out}/result.json",
    "large_requests": "--seconds 0.2 --json {out}/result.json",
    "serve": "--url {url} --model {served} --concurrency 2 --requests 2 --warmup 1 --json {out}/result.json",
}
SLOW = {  # a real model, or many moves
    "equality": "--quick --json {out}/result.json",
    "experts": "--repeat 1 --out {out}/result.json",
    "grammar": "--quick --json {out}/result.json",
    "migration": "--quick --json {out}/result.json",
    "scenarios": "--quick --json {out}/result.json",
    "succession": "--quick --json {out}/result.json",
    "transfer": "--blocks 4 --batch 1 --repeat 1 --rounds 1 --out {out}/result.json",
}
NEED_A_GPU = ("kernels", "products", "copies")
SLOW_SECTIONS = ("moves", "http", "transformers")


def names_of_commands() -> list[str]:
    """Return the modules in bench/ that run something if they are started by `python -m`."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if any(map(_is_start, ast.parse(file.read_text()).body)))


def _is_start(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def test_each_benchmark_has_a_dry_run() -> None:
    assert names_of_commands() == sorted([*IN_PROCESS, *PROCESSES, *DAEMONS, *SLOW])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Long enough for the prompts of bench.engine.
    return make_tiny_llama(tmp_path_factory.mktemp("model"), max_position=4096)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More threads than CPUs make tiny operations slow."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _call(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(sys, "argv", [f"bench.{name}", *arguments])
    return importlib.import_module(f"bench.{name}").main()


def _run(name: str, arguments: str) -> None:
    command = [sys.executable, "-m", f"bench.{name}", *arguments.split()]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def _check_result(arguments: str, out: Path) -> None:
    """If a run is meant to write its result, it has written JSON that is not empty."""
    if "result.json" in arguments:
        assert json.loads((out / "result.json").read_text())


@pytest.mark.integration
@pytest.mark.parametrize("name", names_of_commands())
def test_help_is_printed_and_nothing_runs(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        _call(name, ["--help"], monkeypatch)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.integration
@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_small_run_ends_well(name, model, tmp_path, monkeypatch, one_thread):
    arguments = IN_PROCESS[name].format(out=tmp_path, model=model)
    assert not _call(name, arguments.split(), monkeypatch)
    _check_result(arguments, tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize("name", PROCESSES)
def test_a_small_run_in_processes_ends_well(name, tmp_path):
    arguments = PROCESSES[name].format(out=tmp_path)
    _run(name, arguments)
    _check_result(arguments, tmp_path)


@pytest.mark.e2e
@pytest.mark.timeout(400)  # the first start on a machine compiles
@pytest.mark.parametrize("name", DAEMONS)
def test_a_small_run_with_stub_engines_ends_well(name, tmp_path):
    if name != "serve":
        arguments = DAEMONS[name].format(out=tmp_path)
        _run(name, arguments)
    else:
        with serving("--engine", "stub", "--devices", "cpu") as daemon:
            arguments = DAEMONS[name].format(out=tmp_path, url=daemon.url, served=daemon.model)
            _run(name, arguments)
    _check_result(arguments, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SLOW)
def test_a_small_run_with_a_real_model_ends_well(name, tmp_path):
    arguments = SLOW[name].format(out=tmp_path)
    _run(name, arguments)
    _check_result(arguments, tmp_path)


def _sections() -> list[object]:
    return [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(400)] if name in SLOW_SECTIONS else ())
        for name in gpu.SECTIONS
        if name not in NEED_A_GPU
    ]


@pytest.mark.integration
@pytest.mark.parametrize("section", _sections())
def test_a_section_of_the_gpu_benchmark_runs_dry_on_the_cpu(section, tmp_path, monkeypatch, one_thread):
    assert not _call("gpu", ["--section", section, "--dry-run", "--out", str(tmp_path)], monkeypatch)
    figures = [json.loads(line) for line in (tmp_path / f"{section}.figures").read_text().splitlines()]
    assert figures and all(figure["section"] == section and figure["value"] >= 0 for figure in figures)


@pytest.mark.integration
@pytest.mark.parametrize("section", NEED_A_GPU)
def test_a_section_that_needs_a_gpu_says_so(section, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="needs a GPU"):
        _call("gpu", ["--section", section, "--dry-run", "--out", str(tmp_path)], monkeypatch)
