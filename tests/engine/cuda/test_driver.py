"""What the driver tells about a machine, and the reasons for GPUs that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemon.engine.cuda import driver
from daemon.engine.cuda.kernels import KernelError
from tests.engine.cuda.fake_driver import FakeDriver

pytestmark = pytest.mark.unit


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(tmp_path / "machine", monkeypatch)


def test_nvidia_smi_gives_architectures_driver_and_mig_mode(machine: FakeDriver):
    machine.smi("9.0, 580.65.06, Enabled", "8.9, 580.65.06, [N/A]")
    assert driver.survey() == driver.Report(("9.0a", "8.9"), (True, False), 2, "580.65.06", "")


def test_a_machine_without_a_driver_has_no_gpus_and_no_problem(machine: FakeDriver):
    assert driver.survey() == driver.Report((), (), 0, "", "")


def test_without_nvidia_smi_the_module_gives_number_and_version(machine: FakeDriver):
    machine.module(2, "550.54.15")
    machine.nodes("nvidia0", "nvidia1", "nvidiactl")
    assert driver.survey() == driver.Report((), (), 2, "550.54.15", "")


def test_a_gpu_that_is_too_old_is_named(machine: FakeDriver):
    machine.smi("6.1, 580.65.06, [N/A]")
    with pytest.raises(KernelError, match=r"6\.1"):
        driver.survey()


def test_a_container_without_its_gpus_is_told_how_to_get_them(machine: FakeDriver):
    machine.module(8, "580.65.06")
    for setting in ({}, {"status": 9}):
        machine.smi("NVIDIA-SMI could not find any device", **setting)
        problem = driver.survey().problem
        assert "has 8 GPUs, but there is no /dev/nvidia0" in problem
        assert "--gpus all" in problem and "nvidia-modprobe" in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_device_files_of_another_group_are_named(machine: FakeDriver):
    machine.module(1)
    machine.nodes("nvidia0")
    (machine.root / "dev/nvidia0").chmod(0)
    assert "may not open" in driver.survey().problem


@pytest.mark.parametrize(
    ("said", "gpus", "version", "words"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", 1, "580.1", "restart this machine"),
        ("NVIDIA-SMI has failed because it could not communicate with the driver.", 0, "", "sudo modprobe nvidia"),
        ("No devices were found", 0, "580.65.06", "finds no GPU"),
    ],
)
def test_what_nvidia_smi_says_is_passed_on_with_advice(
    machine: FakeDriver, said: str, gpus: int, version: str, words: str
):
    machine.smi(said, "more", status=9)
    machine.module(gpus, version)
    machine.nodes(*(["nvidia0"] if gpus else []))
    problem = driver.survey().problem
    assert said in problem and words in problem and "more" not in problem


@pytest.mark.parametrize(
    ("version", "cuda", "least"),
    [
        ("550.54.15", "13.0", 580), ("579.99", "13.4", 580), ("580.65.06", "13.0", None), ("610.2", "13.0", None),
        ("470.57.02", "12.8", 525), ("535.1", "12.8", None), ("", "13.0", None), ("550.1", "14.0", None),
    ],
)  # fmt: skip
def test_a_driver_is_too_old_for_a_newer_cuda(version: str, cuda: str, least: int | None):
    found = driver.too_old(version, cuda)
    assert found == "" if least is None else (f"driver {version}" in found and f"needs driver {least}" in found)


def test_an_old_driver_with_cuda_compat_is_new_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "_ASK_CUDA", "print(13000)")
    assert driver.too_old("550.54.15", "13.0") == ""
    monkeypatch.setattr(driver, "_ASK_CUDA", "print(12040)")
    assert driver.too_old("550.54.15", "13.0")


@pytest.mark.parametrize(
    ("rows", "nodes", "words"),
    [
        (["9.0, 550.54.15, Disabled"], ["nvidia0", "nvidia-uvm"], "too old for PyTorch with CUDA 13.0"),
        (["9.0, 580.65.06, Enabled"], ["nvidia0", "nvidia-uvm"], "CUDA_VISIBLE_DEVICES=MIG-"),
        (["9.0, 580.65.06, Disabled"], ["nvidia0"], "no /dev/nvidia-uvm"),
        (["9.0, 580.65.06, Disabled"], ["nvidia0", "nvidia-uvm"], ""),
        (["9.0, 580.65.06, [N/A]"], [], ""),  # WSL has no such files
        (["6.1, 580.65.06, [N/A]"], ["nvidia0"], "6.1"),
    ],
)
def test_an_engine_without_a_device_says_why(machine: FakeDriver, rows: list[str], nodes: list[str], words: str):
    machine.smi(*rows)
    machine.nodes(*nodes)
    why = driver.why_no_device("13.0")
    assert words in why if words else why == ""
