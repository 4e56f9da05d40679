"""Which devices there are, and what is refused before an engine starts on a GPU."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.cli import devices, llumd
from daemon.config import Config, ConfigError
from daemon.engine.cuda import kernels
from daemon.models.model_config import ModelConfig, read_model_config
from tests.models.tiny_model import make_tiny_llama

Machine = Callable[..., None]


@pytest.fixture
def model_config(tmp_path: Path) -> ModelConfig:
    return read_model_config(make_tiny_llama(tmp_path / "tiny", head_dim=64, weights=False), load_format="dummy")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make this a machine whose GPUs have these compute capabilities, with a PyTorch for that CUDA and no kernels."""

    def make(*capabilities: str, shown: str | None = None, cuda: str | None = "13.0") -> None:
        tools, torch = tmp_path / "tools", tmp_path / "site" / "torch"
        tools.mkdir()
        torch.mkdir(parents=True)
        lines = "".join(f"{c}\\n" for c in capabilities)
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        (tools / "nvidia-smi").chmod(0o755)
        (torch / "__init__.py").write_text("raise RuntimeError('nobody may import this only to look')")
        (torch / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\nhip = '6.2'\n")
        monkeypatch.setenv("PATH", str(tools))
        monkeypatch.setenv("LLUMD_KERNELS", str(tmp_path / "kernels"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        spec = devices.importlib.util.spec_from_file_location("torch", torch / "__init__.py")
        monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: spec)

    return make


def found(config: Config) -> tuple[list[str], list[str]]:
    """The devices, and what was said."""
    said: list[str] = []
    return devices.find(config, said.append), said


# -- the default -------------------------------------------------------------------------------


def test_every_gpu_gets_an_engine(machine: Machine):
    machine("9.0", "9.0", "9.0")
    assert found(Config()) == (["cuda:0", "cuda:1", "cuda:2"], [])


def test_without_gpus_two_engines_share_the_cpu(machine: Machine):
    machine()
    assert found(Config()) == (["cpu", "cpu"], [])


def test_engines_without_a_model_need_no_gpu(machine: Machine):
    machine("9.0")
    assert found(Config(engine="stub")) == (["cpu", "cpu"], [])


def test_a_gpu_of_no_use_is_said_to_be_so(machine: Machine):
    machine("6.1")
    names, said = found(Config())
    assert names == ["cpu", "cpu"]
    assert "6.1" in said[0] and "serving on the CPU" in said[0]


@pytest.mark.parametrize(
    ("installed", "shown", "number"),
    [
        (4, None, 4), (4, "", 0), (4, "-1", 0), (4, "2", 1), (4, "0, 3", 2), (4, "0,7,1", 1), (4, "1,-1,2", 1),
        (2, "GPU-8f2c,MIG-11", 2), (4, "NoDevFiles", 0), (0, "0", 0), (0, None, 0),
    ],
)  # fmt: skip
def test_cuda_shows_what_it_is_told_to(installed: int, shown: str | None, number: int):
    assert devices.visible(installed, shown) == number


@given(st.integers(0, 16), st.lists(st.integers(-2, 20), max_size=8))
def test_cuda_never_shows_more_than_is_named(installed: int, named: list[int]):
    count = devices.visible(installed, ",".join(map(str, named)))
    assert count <= len(named)
    assert all(0 <= n < installed for n in named[:count])


def test_a_driver_without_tools_still_tells_how_many(machine: Machine, tmp_path: Path):
    machine(shown="1")
    (tmp_path / "gpus" / "0000:1b:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:1c:00.0").mkdir()
    assert devices.look(tmp_path / "gpus") == devices.Gpus(1, "")


def test_unlike_gpus_have_no_common_architecture(machine: Machine):
    machine("9.0", "8.9")
    assert devices.look() == devices.Gpus(2, "")


# -- refusals ----------------------------------------------------------------------------------


def refusal(config: Config, model_config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        devices.check_gpus(config, model_config)
    return str(refused.value)


def test_no_gpu(machine: Machine, model_config: ModelConfig):
    machine()
    said = refusal(Config(devices=["cuda:0"]), model_config)
    assert said.startswith("devices: there is no cuda:0: no NVIDIA GPU is seen") and "--devices cpu,cpu" in said


def test_a_gpu_too_many(machine: Machine, model_config: ModelConfig):
    machine("9.0", "9.0", shown="1")
    said = refusal(Config(devices=["cuda:0", "cuda:1"]), model_config)
    assert "no cuda:1: GPUs here are numbered 0 to 0" in said and "CUDA_VISIBLE_DEVICES is '1'" in said


def test_a_pytorch_for_the_cpu(machine: Machine, model_config: ModelConfig):
    machine("9.0", cuda=None)
    assert "LLUMD_TORCH=cuda bin/serve" in refusal(Config(devices=["cuda:0"]), model_config)


def test_no_flashinfer(machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    def gone(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    machine("9.0", "8.9")
    monkeypatch.setattr(importlib.metadata, "version", gone)
    assert "flashinfer-python is not installed" in refusal(Config(devices=["cuda:0"]), model_config)


def test_missing_kernels_come_with_the_command_that_builds_them(machine: Machine, model_config: ModelConfig):
    pytest.importorskip("flashinfer", reason="the extra `cuda` is not installed")
    machine("9.0")
    said = refusal(Config(model="my models/a", devices=["cuda:0"], kv_dtype="fp8"), model_config)
    assert "e4m3" in said and "rotary" in said
    assert "llumd kernels build 'my models/a' --kv-dtype fp8 --arch 9.0a" in said


def test_with_everything_there_nothing_is_refused(machine: Machine, model_config: ModelConfig):
    pytest.importorskip("flashinfer", reason="the extra `cuda` is not installed")
    machine("9.0")
    for spec in kernels.required(model_config, arch="9.0a"):
        folder = kernels.directory("9.0a") / spec.name
        folder.mkdir(parents=True)
        (folder / f"{spec.name}.so").write_bytes(b"library")
        (folder / kernels.RECORD).write_text(json.dumps({"size": 7, "nvcc": "13.0", "tvm_ffi": "0.1.6"}))
    devices.check_gpus(Config(devices=["cuda:0", "cuda:0"]), model_config)


def test_check_says_so_and_exits_with_the_code_for_settings(machine: Machine, model_config: ModelConfig, capsys):
    machine("9.0", cuda=None)
    with pytest.raises(SystemExit) as done:
        llumd.main(
            ["check", str(model_config.path), "--load-format", "dummy"]
        )  # the GPU is found without being named
    assert done.value.code == llumd.EXIT_CONFIG
    assert "LLUMD_TORCH=cuda" in capsys.readouterr().err


def test_the_settings_that_run_are_those_for_gpus(
    machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    machine("9.0", "9.0")
    monkeypatch.setattr(devices, "check_gpus", lambda config, model_config: None)
    monkeypatch.setattr(llumd, "check_tokenizer", lambda path: None)
    config, *_ = llumd._prepare(
        Config(model=str(model_config.path), load_format="dummy").replace({"max_num_seqs": 9}, "test")
    )
    assert config.devices == ["cuda:0", "cuda:1"]
    assert (config.max_num_seqs, config.max_batch_tokens, config.itl_target) == (9, 8192, 0.05)


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '13.0'\nhip = None", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("__version__ = '2.11.0+cu130'\n", None),
    ],
)
def test_what_cuda_pytorch_is_built_for(tmp_path: Path, text: str, cuda: str | None):
    (tmp_path / "version.py").write_text(text)
    assert devices.torch_cuda(tmp_path / "version.py") == cuda


def test_the_pytorch_of_this_environment_says_what_it_is():
    import torch.version

    assert devices.torch_cuda(Path(torch.version.__file__)) == torch.version.cuda
