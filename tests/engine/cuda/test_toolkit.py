"""The tools that compile kernels: the nvcc that fits PyTorch is found, and what is missing is named."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.engine.cuda import toolkit
from daemon.engine.cuda.kernels import KernelError

pytestmark = pytest.mark.unit

Put = Callable[[str, str], Path]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Return a function that puts an nvcc of a version to "pypi", "path", "system" or "home", on a machine with none.

    PyTorch has CUDA 13.0.
    """
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("c++", "ninja"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    (tmp_path / "site").mkdir()
    homes = {
        "pypi": tmp_path / "site/nvidia/cu13",
        "path": tmp_path / "path",
        "system": tmp_path / "system",
        "home": tmp_path / "home",
    }
    monkeypatch.setenv("PATH", f"{tools}:{homes['path'] / 'bin'}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(toolkit, "_SYSTEM", homes["system"])
    monkeypatch.setattr(toolkit, "torch_cuda_version", lambda: "13.0")

    def put_one(place: str, version: str) -> Path:
        nvcc = homes[place] / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        answer = f"Cuda compilation tools, release {version}, V{version}.88"
        here = 'echo "#$ _HERE_=$(dirname "$0")"'
        nvcc.write_text(f'#!/bin/sh\ncase "$*" in *dryrun*) {here} ;; *) echo "{answer}" ;; esac\n')
        nvcc.chmod(0o755)
        importlib.invalidate_caches()
        if place == "home":
            monkeypatch.setenv("CUDA_HOME", str(homes[place]))
        return nvcc

    return put_one


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ({"pypi": "13.0", "path": "13.2", "system": "13.0"}, "pypi"),
        ({"path": "13.2", "system": "13.0"}, "path"),
        ({"path": "12.4", "system": "13.1"}, "system"),
        ({"path": "12.4", "pypi": "13.0"}, "pypi"),
        ({"home": "13.1", "pypi": "13.0"}, "home"),
    ],
)
def test_an_nvcc_of_pytorchs_major_version_is_chosen(put: Put, installed: dict[str, str], chosen: str):
    found = {place: put(place, version) for place, version in installed.items()}
    tools = toolkit.toolchain()
    assert (tools.nvcc, tools.version) == (found[chosen], installed[chosen])
    assert tools.home == found[chosen].parent.parent


def test_with_a_pytorch_for_the_cpu_any_nvcc_will_do(put: Put, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toolkit, "torch_cuda_version", lambda: None)
    put("path", "12.4")
    assert toolkit.toolchain().version == "12.4"


def error_message() -> str:
    with pytest.raises(KernelError) as error:
        toolkit.toolchain()
    return str(error.value)


def test_an_nvcc_of_another_major_version_is_never_taken_silently(put: Put):
    nvcc = put("path", "12.4")
    message = error_message()
    assert f"{nvcc} has CUDA 12.4, PyTorch here has 13.0; no other nvcc" in message
    assert "cuda-toolkit[nvcc,cccl]==13.0.*" in message and "llumd kernels pack" in message
    put("home", "12.8")
    assert "which has CUDA 12.8, but PyTorch here has CUDA 13.0" in error_message()


def test_without_any_nvcc_the_message_says_what_installs_it(put: Put, monkeypatch: pytest.MonkeyPatch):
    assert "pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'" in error_message()
    monkeypatch.setattr(toolkit, "torch_cuda_version", lambda: None)
    assert "LLUMD_TORCH=cuda bin/llumd kernels build" in error_message()


def test_the_compiler_is_asked_for_by_the_names_of_its_packages(put: Put, tmp_path: Path):
    put("pypi", "13.0")
    (tmp_path / "tools" / "c++").unlink()
    message = error_message()
    assert "no C++ compiler" in message and "apt install g++" in message and "dnf install gcc-c++" in message


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '13.0'\nhip = None", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("__version__ = '2.11.0+cu130'\n", None),
        (None, None),
    ],
)
def test_the_cuda_version_of_a_pytorch_build(tmp_path: Path, text: str | None, cuda: str | None):
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    assert toolkit.torch_cuda(tmp_path / "version.py") == cuda


def test_the_cuda_version_of_the_installed_pytorch():
    import torch.version

    assert toolkit.torch_cuda_version() == torch.version.cuda
