"""Our own kernels compiled for a GPU: no warnings, no register spills, and the required rounding."""

import re
import shutil
import subprocess

import pytest

from daemon.engine.cuda import kernels
from daemon.engine.cuda.small_batch import MAX_ROWS

# On a busy machine the compilers take minutes: they run at a low priority.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

FLAGS = {
    "sampler": kernels.SAMPLER_NVCC_FLAGS,
    "append": kernels.APPEND_NVCC_FLAGS,
    "gemv": kernels.GEMV_NVCC_FLAGS,
    "silu": kernels.SILU_NVCC_FLAGS,
}
# append: two formats, with norms and without. gemv: add, gate, logits, and heads in two formats. silu: and GELU.
VARIANTS = {"sampler": 1, "append": 4, "gemv": 5 * MAX_ROWS, "silu": 2}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The output of nvcc and the PTX of each kernel. They are compiled in parallel."""
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
    output = {name: process.communicate()[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, output[name]
    return {name: (output[name], (folder / f"{name}.ptx").read_text()) for name, folder in folders.items()}


@pytest.mark.parametrize("name", FLAGS)
def test_kernels_do_not_spill_registers(compiled, name):
    output, _ = compiled[name]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", output)]
    assert len(spilled) == VARIANTS[name]
    assert max(spilled) <= (4 if name == "sampler" else 0)


@pytest.mark.parametrize("name", ["sampler", "append"])
def test_exact_kernels_have_no_fused_multiply_add(compiled, name):
    _, ptx = compiled[name]
    assert "mul.rn.f32" in ptx  # rounded separately
    assert "fma." not in ptx
    assert ".ftz" not in ptx


def test_products_use_fused_multiply_add_and_bypass_l1(compiled):
    _, ptx = compiled["gemv"]
    assert "fma.rn.f32" in ptx
    assert "ld.global.nc.L1::no_allocate.v4.u32" in ptx
    assert ptx.count("griddepcontrol.wait") == VARIANTS["gemv"]
