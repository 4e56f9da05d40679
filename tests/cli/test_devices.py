"""Detection of devices, and the checks before an engine starts on a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.cli import devices, gpu_kernels, llumd, prepare
from daemon.config import Config, ConfigError
from daemon.engine.cuda import compile as compiler
from daemon.engine.cuda import kernels, toolkit
from daemon.ipc.child import EXIT_CONFIG
from daemon.models.model_config import ModelConfig, read_model_config
from tests.engine.cuda.fake_driver import FakeDriver
from tests.models.tiny_model import make_tiny_llama

Machine = Callable[..., None]


@pytest.fixture
def model_config(tmp_path: Path) -> ModelConfig:
    return read_model_config(make_tiny_llama(tmp_path / "tiny", head_dim=64, weights=False))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(tmp_path / "machine", monkeypatch)


@pytest.fixture
def machine(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate a machine: GPUs of these compute capabilities, a PyTorch build for `cuda`, and no kernels.

    A GPU may have more fields of nvidia-smi behind its capability: the driver and the MIG mode. `shown` is the value
    of $CUDA_VISIBLE_DEVICES.
    """

    def make(*gpus: str, shown: str | None = None, cuda: str | None = "13.0") -> None:
        torch = tmp_path / "site" / "torch"
        torch.mkdir(parents=True)
        fake.smi(*gpus)
        (torch / "__init__.py").write_text("raise RuntimeError('checks must not import torch')")
        (torch / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\nhip = '6.2'\n")
        monkeypatch.setenv("LLUMD_KERNELS", str(tmp_path / "kernels"))
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        found = importlib.util.find_spec
        spec = importlib.util.spec_from_file_location("torch", torch / "__init__.py")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else found(name))

    return make


def default_devices(config: Config) -> tuple[list[str], list[str]]:
    """Return the default devices and the progress messages."""
    messages: list[str] = []
    return devices.default_devices(config, messages.append), messages


# -- the default -------------------------------------------------------------------------------


def test_every_gpu_gets_an_engine(machine: Machine):
    machine("9.0", "9.0", "9.0")
    assert default_devices(Config()) == (["cuda:0", "cuda:1", "cuda:2"], [])


def test_without_gpus_two_engines_share_the_cpu(machine: Machine):
    machine()
    assert default_devices(Config()) == (["cpu", "cpu"], [])


def test_engines_without_a_model_need_no_gpu(machine: Machine):
    machine("9.0")
    assert default_devices(Config(engine="stub")) == (["cpu", "cpu"], [])


def test_the_reason_for_an_unusable_gpu_is_printed(machine: Machine):
    machine("6.1")
    names, messages = default_devices(Config())
    assert names == ["cpu", "cpu"]
    assert "6.1" in messages[0] and "serving on the CPU" in messages[0]


@pytest.mark.parametrize(
    ("installed", "shown", "number"),
    [
        (4, None, 4), (4, "", 0), (4, "-1", 0), (4, "2", 1), (4, "0, 3", 2), (4, "0,7,1", 1), (4, "1,-1,2", 1),
        (2, "GPU-8f2c,MIG-11", 2), (4, "NoDevFiles", 0), (0, "0", 0), (0, None, 0),
    ],
)  # fmt: skip
def test_visible_devices_are_counted_as_in_cuda(installed: int, shown: str | None, number: int):
    assert devices.count_visible(installed, shown) == number


@given(st.integers(0, 16), st.lists(st.integers(-2, 20), max_size=8))
def test_at_most_the_listed_devices_are_visible(installed: int, named: list[int]):
    count = devices.count_visible(installed, ",".join(map(str, named)))
    assert count <= len(named)
    assert all(0 <= n < installed for n in named[:count])


def test_without_nvidia_smi_the_driver_gives_the_number(machine: Machine, fake: FakeDriver):
    machine(shown="1")
    fake.module(2)
    fake.nodes("nvidia0", "nvidia1")
    assert devices.detect_gpus() == devices.Gpus(1)


def test_different_gpus_have_different_architectures(machine: Machine):
    machine("9.0", "8.9")
    assert devices.detect_gpus() == devices.Gpus(2, frozenset({"9.0a", "8.9"}))


def test_a_container_without_its_gpus_uses_the_cpu_and_says_why(machine: Machine, fake: FakeDriver):
    machine()
    fake.module(2, "580.65.06")
    names, messages = default_devices(Config())
    assert names == ["cpu", "cpu"]
    assert "no /dev/nvidia0" in messages[0] and "serving on the CPU" in messages[0]


SLICED, WHOLE = "9.0, 580.65.06, Enabled", "9.0, 580.65.06, Disabled"


@pytest.mark.parametrize(
    ("gpus", "shown", "number", "slices"),
    [
        ([SLICED, SLICED], None, 1, True),
        ([SLICED], "MIG-1,MIG-2", 1, True),
        ([WHOLE, WHOLE, SLICED], "0,1", 2, False),
        ([WHOLE, WHOLE, SLICED], "2", 1, True),
        ([SLICED], "", 0, True),
        ([WHOLE, WHOLE], None, 2, False),
    ],
)
def test_of_mig_slices_cuda_shows_one(
    machine: Machine, gpus: list[str], shown: str | None, number: int, slices: bool
):
    machine(*gpus, shown=shown)
    found = devices.detect_gpus()
    assert (found.number, found.slices) == (number, slices)


def test_the_default_for_mig_slices_is_one_engine_and_the_reason(machine: Machine):
    machine(SLICED, shown="MIG-1,MIG-2")
    names, messages = default_devices(Config())
    assert names == ["cuda:0"] and "one MIG slice" in messages[0]


# -- errors ------------------------------------------------------------------------------------


def error_message(config: Config, model_config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as error:
        gpu_kernels.missing_kernels(config, model_config, devices.check_gpus(config))
    return str(error.value)


def test_no_gpu_is_visible(machine: Machine, model_config: ModelConfig):
    machine()
    message = error_message(Config(devices=["cuda:0"]), model_config)
    assert (
        message.startswith("devices: there is no cuda:0: no NVIDIA GPU is visible") and "--devices cpu,cpu" in message
    )


def test_a_gpu_number_that_is_too_high(machine: Machine, model_config: ModelConfig):
    machine("9.0", "9.0", shown="1")
    message = error_message(Config(devices=["cuda:0", "cuda:1"]), model_config)
    assert (
        "no cuda:1: the visible GPUs have the numbers 0 to 0" in message and "CUDA_VISIBLE_DEVICES is '1'" in message
    )


def test_a_second_mig_slice_needs_another_daemon(machine: Machine, model_config: ModelConfig):
    machine(SLICED, shown="MIG-1,MIG-2")
    message = error_message(Config(devices=["cuda:0", "cuda:1"]), model_config)
    assert "no cuda:1" in message and "another slice needs another llumd" in message
    devices.check_gpus(Config(devices=["cuda:0", "cuda:0"]))


def test_a_driver_that_is_too_old(machine: Machine, model_config: ModelConfig):
    machine("9.0, 550.54.15, Disabled")
    message = error_message(Config(devices=["cuda:0"]), model_config)
    assert "driver 550.54.15 is too old for PyTorch with CUDA 13.0, which needs driver 580" in message
    assert "update the driver, or serve on the CPU" in message


def test_gpus_that_cannot_be_opened(machine: Machine, fake: FakeDriver, model_config: ModelConfig):
    machine()
    fake.module(1)
    assert "docker run --gpus all" in error_message(Config(devices=["cuda:0"]), model_config)


def test_a_pytorch_build_for_the_cpu(machine: Machine, model_config: ModelConfig):
    machine("9.0", cuda=None)
    assert "LLUMD_TORCH=cuda bin/serve" in error_message(Config(devices=["cuda:0"]), model_config)


def test_flashinfer_is_not_installed(machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    def not_installed(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    machine("9.0", "8.9")
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert "flashinfer-python is not installed" in error_message(Config(devices=["cuda:0"]), model_config)


def test_the_error_for_missing_kernels_has_the_command_that_builds_them(machine: Machine, model_config: ModelConfig):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    machine("9.0")
    config = Config(model="my models/a", devices=["cuda:0"], kv_dtype="fp8", build=False)
    message = error_message(config, model_config)
    assert "e4m3" in message and "rotary" in message
    assert "llumd kernels build 'my models/a' --kv-dtype fp8 --arch 9.0a" in message


def test_a_complete_machine_passes_the_checks(machine: Machine, model_config: ModelConfig):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    machine("9.0")
    for spec in kernels.required(model_config, arch="9.0a"):
        folder = kernels.directory("9.0a") / spec.name
        folder.mkdir(parents=True)
        (folder / f"{spec.name}.so").write_bytes(b"library")
        (folder / kernels.RECORD).write_text(json.dumps({"size": 7, "nvcc": "13.0", "tvm_ffi": "0.1.6"}))
    for build in (True, False):
        config = Config(devices=["cuda:0", "cuda:0"], build=build)
        assert gpu_kernels.missing_kernels(config, model_config, devices.check_gpus(config)) == {}


def test_check_fails_with_the_exit_code_for_settings(machine: Machine, model_config: ModelConfig, capsys):
    machine("9.0", cuda=None)
    with pytest.raises(SystemExit) as done:
        llumd.main(["check", str(model_config.path), "--load-format", "dummy"])  # `devices` is empty
    assert done.value.code == EXIT_CONFIG
    assert "LLUMD_TORCH=cuda" in capsys.readouterr().err


def test_prepare_applies_the_defaults_for_gpus(
    machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    machine("9.0", "9.0")
    monkeypatch.setattr(devices, "check_gpus", lambda config: devices.Gpus(2))
    monkeypatch.setattr(prepare, "cpus", lambda: 12)
    config = Config(model=str(model_config.path), load_format="dummy").replace({"max_num_seqs": 9}, "test")
    assert prepare.prepare(config.replace({"frontends": 1}, "test"), print).config.frontends == 1
    config = prepare.prepare(config, print).config
    assert config.frontends == 3
    assert config.devices == ["cuda:0", "cuda:1"]
    assert (config.max_num_seqs, config.max_batch_tokens, config.itl_target) == (9, 8192, 0.05)


# -- missing kernels


def test_the_start_needs_a_compiler_and_so_does_the_check(machine: Machine, model_config: ModelConfig, monkeypatch):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    machine("9.0", "8.9")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolkit, "_find_nvcc", lambda cuda: (Path("nvcc"), "13.0"))
    config = Config(model=str(model_config.path), load_format="dummy")
    for on_trial in (True, False):
        with pytest.raises(ConfigError) as error:
            prepare.prepare(config, print, on_trial=on_trial)
        message = str(error.value)
        assert "6 compiled kernels for 8.9 and 6 compiled kernels for 9.0a are not in" in message
        assert "apt install g++" in message


def test_the_start_compiles_missing_kernels_and_the_check_does_not(
    machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    machine("9.0")
    built: list[str] = []
    tools = toolkit.Toolchain(Path("true"), Path("."), "13.0", Path("ninja"), "c++")
    monkeypatch.setattr(toolkit, "toolchain", lambda: tools)
    monkeypatch.setattr(toolkit, "check_arch", lambda tools, arch: None)
    monkeypatch.setattr(compiler, "build", lambda specs, arch, where, progress: built.extend(s.name for s in specs))
    config = Config(model=str(model_config.path), load_format="dummy")
    messages: list[str] = []
    prepare.prepare(config, messages.append, on_trial=True)
    assert built == [] and "6 compiled kernels for 9.0a" in messages[-1] and "llumd serve" in messages[-1]
    prepare.prepare(config, messages.append)
    assert built == [spec.name for spec in kernels.required(model_config, arch="9.0a")]
    assert "--no-build" in messages[-1]
