"""Our own kernels, compiled as for a GPU: without a warning, in the registers there are, rounding as they must."""

import re
import shutil
import subprocess

import pytest

from daemon.engine.cuda import kernels
from daemon.engine.cuda.small_batch import MOST_ROWS

FLAGS = {"sampler": kernels.SAMPLER_NVCC_FLAGS, "append": kernels.APPEND_NVCC_FLAGS, "gemv": kernels.GEMV_NVCC_FLAGS}
VARIANTS = {"sampler": 1, "append": 2, "gemv": 5 * MOST_ROWS}  # gemv: add, gate, logits, and heads in two formats


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What nvcc says of each, and its PTX. They are compiled at the same time."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    libinfo = pytest.importorskip("tvm_ffi").libinfo
    includes = ["-isystem", libinfo.find_include_path(), "-isystem", libinfo.find_dlpack_include_path()]
    folders = {name: tmp_path_factory.mktemp(name) for name in FLAGS}
    running = {
        name: subprocess.Popen(
            [
                "nice",
                "-n15",
                nvcc,
                *FLAGS[name],
                "-gencode=arch=compute_90a,code=sm_90a",
                "-Werror",
                "all-warnings",
                "-Xcompiler",
                "-fPIC,-Wall,-Wextra",
                "-Xptxas",
                "-v",
                *includes,
                "--keep",
                "--keep-dir",
                str(folder),
                "-c",
                str(kernels._SOURCES / f"{name}.cu"),
                "-o",
                str(folder / f"{name}.o"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, folder in folders.items()
    }
    said = {name: process.communicate()[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, said[name]
    return {name: (said[name], (folder / f"{name}.ptx").read_text()) for name, folder in folders.items()}


@pytest.mark.parametrize("name", FLAGS)
def test_registers_do(compiled, name):
    said, _ = compiled[name]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    assert len(spilled) == VARIANTS[name]
    assert max(spilled) <= (4 if name == "sampler" else 0)


@pytest.mark.parametrize("name", ["sampler", "append"])
def test_what_must_be_exact_fuses_nothing(compiled, name):
    _, ptx = compiled[name]
    assert "mul.rn.f32" in ptx  # rounded by itself
    assert "fma." not in ptx
    assert ".ftz" not in ptx


def test_products_fuse_and_read_past_the_cache(compiled):
    _, ptx = compiled["gemv"]
    assert "fma.rn.f32" in ptx
    assert "ld.global.nc.L1::no_allocate.v4.u32" in ptx
    assert ptx.count("griddepcontrol.wait") == VARIANTS["gemv"]
