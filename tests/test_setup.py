"""bin/ creates and updates .venv, only once, and recovers from interruptions. A fake Python records the calls."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "env bash readlink cat cut sha256sum find rm mkdir cp touch tail uname mv grep flock basename dirname sleep"
SCRIPTS = ("serve", "test", "llumd", "llumctl", "_setup")

# A fake Python, which implements the calls of the scripts. The variable FAKE selects its faults.
PYTHON = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
*version_info*) [[ $FAKE != *old* ]] ;;
*ensurepip*) [[ $FAKE != *bare* ]] ;;
*torch.version.cuda*) [[ $FAKE != *cpu-build* ]] ;;
*'m.version("torch")'*) [[ -e $(dirname "$0")/torch ]] ;;
*'import pip'*) [[ -e $(dirname "$0")/pip ]] ;;
*"-m venv"*)
    mkdir -p "${@: -1}/bin"
    cp "$0" "${@: -1}/bin/python"
    touch "${@: -1}/bin/pip"
    ;;
*--report*)
    while [[ $1 != --report ]]; do shift; done
    name=filelock
    [[ $FAKE != *heavy* ]] || name=nvidia-cublas
    printf '{"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "%s"}}]}' "$name" >"$2"
    ;;
*"pip install"*torch==*--editable*)
    [[ $FAKE != *broken* ]] || { echo "no such index" >&2; exit 1; }
    [[ $FAKE != *slow* ]] || sleep 1.5
    ;;
*"pip install"*torch==*) touch "$(dirname "$0")/torch" ;;
esac
"""


class Checkout:
    """A copy of bin/ in a directory without tools other than TOOLS and the fake Python."""

    def __init__(self, path: Path) -> None:
        self.path, self.calls = path / "repo", path / "calls"
        (self.path / "bin").mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(ROOT / "bin" / name, self.path / "bin" / name)
        shutil.copy(ROOT / "pyproject.toml", self.path)
        tools = path / "tools"
        tools.mkdir()
        (tools / "python3.12").write_text(PYTHON)
        (tools / "python3.12").chmod(0o755)
        for name in TOOLS.split():
            (tools / name).symlink_to(str(shutil.which(name)))
        self.env = {"PATH": str(tools), "CALLS": str(self.calls), "FAKE": "", "LLUMD_TORCH": "cpu"}

    def start(self, command: str, *args: str, cwd: Path | None = None, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.path / "bin" / command, *args], env=self.env | env, cwd=cwd, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, command: str, *args: str, **more) -> tuple[int, str, list[str]]:
        """Return the exit status, the output and the calls of Python."""
        self.calls.write_text("")
        process = self.start(command, *args, **more)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output, self.calls.read_text().splitlines()

    def wait_for_call(self, part: str) -> None:
        while part not in (self.calls.read_text() if self.calls.exists() else ""):
            time.sleep(0.02)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


SERVE = "python -P -m daemon.cli.llumd serve --port 1"


def installs(calls: list[str]) -> list[str]:
    return [c for c in calls if "pip install" in c and "--dry-run" not in c and "--upgrade pip" not in c]


def test_the_first_start_sets_up_and_the_second_does_not(checkout):
    status, output, calls = checkout.run("serve", "--port", "1")
    assert status == 0 and "set-up is complete" in output
    first, second = installs(calls)
    assert "torch==" in first and second.endswith(f"--editable {checkout.path}")
    assert calls[-1] == SERVE
    assert checkout.run("serve", "--port", "1") == (0, "", [SERVE])
    assert checkout.run("llumd", "status")[2] == ["python -P -m daemon.cli.llumd status"]


def test_the_set_up_for_tests_has_more_packages_and_is_enough_for_serving(checkout):
    checkout.run("serve", "--port", "1")
    status, _, calls = checkout.run("test", "tests/x.py", "-k", "y")
    assert status == 0 and "[flashinfer,test]" in installs(calls)[-2]
    assert calls[-1] == "python -m pytest tests/x.py -k y"
    assert checkout.run("serve", "--port", "1")[2] == [SERVE]


def test_lint_layout_and_types_are_checked_before_the_tests(checkout):
    checkout.run("test", "x")
    checks = ["python -m ruff check .", "python -m ruff format --check .", "python -m mypy"]
    parallel = "python -m pytest -n 2 --dist loadfile -m"
    first, second = "(unit or integration)", "not unit and not integration"
    assert checkout.run("test", "--fast", "-x")[2] == [
        *checks,
        f"{parallel.removesuffix(' -m')} --hypothesis-profile fast -m unit -x",
    ]
    both = [f"{parallel} {first} and not slow", f"python -m pytest -m {second} and not slow"]
    assert checkout.run("test")[2] == [*checks, *both]
    assert checkout.run("test", "--slow")[2] == [*checks, f"{parallel} {first} ", f"python -m pytest -m {second} "]


def test_a_change_of_pyproject_updates_the_environment_in_place(checkout):
    checkout.run("serve")
    with (checkout.path / "pyproject.toml").open("a") as f:
        f.write("# changed\n")
    _, _, calls = checkout.run("serve")
    assert not any("-m venv" in c for c in calls) and len(installs(calls)) == 1


def test_on_a_cpu_only_tests_install_flashinfer_and_without_its_dependencies(checkout):
    assert not any("flashinfer-python" in c for c in checkout.run("serve")[2])
    _, _, calls = checkout.run("test", "x")
    (flashinfer,) = [c for c in installs(calls) if "flashinfer-python" in c]
    assert "--no-deps flashinfer-python==" in flashinfer
    assert any("import flashinfer" in c for c in calls)


@pytest.mark.parametrize("only_the_shell", [False, True])
def test_an_interrupted_set_up_starts_again(checkout, only_the_shell):
    process = checkout.start("serve", FAKE="slow")
    checkout.wait_for_call("--editable")
    process.kill() if only_the_shell else os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    status, output, calls = checkout.run("serve", "--port", "1")
    assert status == 0 and any("-m venv" in c for c in calls) and calls[-1] == SERVE
    # If only the shell was killed, the next set-up waits for pip.
    assert ("waiting for it" in output) == only_the_shell


def test_concurrent_starts_set_up_once(checkout):
    both = [checkout.start("serve", "--port", "1", FAKE="slow") for _ in range(2)]
    assert [p.communicate(timeout=60)[0].count("set-up is complete") for p in both] in ([0, 1], [1, 0])
    calls = checkout.calls.read_text().splitlines()
    assert sum("-m venv" in c for c in calls) == 1 and calls.count(SERVE) == 2


def test_a_failed_installation_shows_the_reason_and_is_repeated(checkout):
    status, output, calls = checkout.run("serve", FAKE="broken")
    assert status == 1 and "no such index" in output and "setup.log" in output
    assert not any("daemon.cli.llumd" in c for c in calls)
    assert checkout.run("serve", "--port", "1")[2][-1] == SERVE


def torch_install(calls: list[str]) -> str:
    return installs(calls)[0]


def test_without_a_gpu_no_cuda_package_is_installed(checkout):
    _, _, calls = checkout.run("serve", FAKE="heavy")
    assert "+cpu" in torch_install(calls)
    assert "--index-url https://download.pytorch.org/whl/cpu" in torch_install(calls)


def test_the_default_index_is_used_if_its_torch_has_no_cuda(checkout):
    assert "--index-url" not in torch_install(checkout.run("serve")[2])


def test_torch_is_installed_from_the_given_index(checkout):
    _, _, calls = checkout.run("serve", LLUMD_TORCH_INDEX="http://127.0.0.1:9/simple")
    assert "--index-url http://127.0.0.1:9/simple torch==" in torch_install(calls)


def test_with_a_gpu_cuda_and_flashinfer_are_installed_into_a_new_environment(checkout):
    checkout.run("serve")
    _, _, calls = checkout.run("serve", LLUMD_TORCH="cuda", FAKE="heavy")
    assert any("-m venv" in c for c in calls)
    assert "--index-url" not in torch_install(calls) and "flashinfer" in installs(calls)[-1]
    assert "[cuda]" in installs(calls)[-2]  # it brings nvcc
    assert "[cuda,test]" in installs(checkout.run("test", "x", LLUMD_TORCH="cuda")[2])[-2]


def test_a_build_for_the_cpu_is_never_taken_for_one_with_cuda(checkout):
    status, output, calls = checkout.run("serve", LLUMD_TORCH="cuda", FAKE="cpu-build")
    _, version = torch_install(calls).split("torch==")
    assert version == f"{version.split(',')[0]},!={version.split(',')[0]}+cpu"  # which pip prefers to the plain one
    assert status == 1 and "the package index of pip has PyTorch" in output and "for the CPU only" in output
    assert "LLUMD_TORCH_INDEX=https://download.pytorch.org/whl/cu130" in output and "LLUMD_TORCH=cpu" in output
    assert SERVE not in calls
    _, output, calls = checkout.run("serve", "--port", "1", LLUMD_TORCH="cuda")
    assert any("-m venv" in c for c in calls) and calls[-1] == SERVE


def put_tool(checkout: Checkout, name: str, script: str) -> None:
    tool = Path(checkout.env["PATH"]) / name
    tool.write_text(f"#!/usr/bin/env bash\n{script}\n")
    tool.chmod(0o755)


def test_a_driver_that_is_too_old_is_named_before_anything_is_fetched(checkout):
    put_tool(checkout, "nvidia-smi", 'case "$*" in *driver_version*) echo 550.54.15 ;; *) echo "GPU 0" ;; esac')
    del checkout.env["LLUMD_TORCH"]
    status, output, calls = checkout.run("serve")
    assert status == 1 and "driver 550.54.15 is too old" in output and "needs 580" in output and not installs(calls)
    assert "LLUMD_TORCH=cpu bin/serve --devices cpu,cpu" in output
    status, output, calls = checkout.run("serve", LLUMD_TORCH="cuda")  # as on a machine that only compiles
    assert status == 0 and "warning: the NVIDIA driver 550.54.15" in output and installs(calls)


def test_a_missing_compiler_is_named_before_the_download(checkout):
    output = checkout.run("serve", LLUMD_TORCH="cuda")[1]
    assert output.index("apt install g++") < output.index("installing PyTorch")
    put_tool(checkout, "c++", "true")
    (checkout.path / "pyproject.toml").write_text("changed")
    assert "g++" not in checkout.run("serve", LLUMD_TORCH="cuda")[1]


def test_an_old_python_is_named_with_what_to_install(checkout):
    put_tool(checkout, "python3", '[[ "$*" != *version_info* ]] && echo "python3 is 3.10.12"')
    status, output, _ = checkout.run("serve", FAKE="old")
    assert status == 1 and "no Python 3.11 or newer found (python3 is 3.10.12)" in output
    assert "ppa:deadsnakes/ppa" in output and "uv python install" in output


def test_the_driver_is_queried_only_by_a_set_up(checkout):
    del checkout.env["LLUMD_TORCH"]
    driver = Path(checkout.env["PATH"]) / "nvidia-smi"
    driver.write_text('#!/bin/sh\necho "nvidia-smi $*" >>"$CALLS"\necho "GPU 0"\n')
    driver.chmod(0o755)
    calls = checkout.run("serve")[2]
    assert "flashinfer" in installs(calls)[-1]
    assert checkout.run("serve", "--port", "1")[2] == [SERVE]


def test_it_works_from_any_directory_and_through_a_link(checkout, tmp_path):
    link = tmp_path / "llumd-serve"
    link.symlink_to(checkout.path / "bin" / "serve")
    (tmp_path / "daemon").mkdir()
    done = subprocess.run([link, "--port", "1"], env=checkout.env, cwd=tmp_path, capture_output=True, check=True)
    assert b"set-up is complete" in done.stderr and done.stdout == b""
    assert (checkout.path / ".venv" / "bin" / "python").exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FAKE": "old"}, "no Python 3.11 or newer"),
        ({"FAKE": "bare"}, "apt install python3.12-venv"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python"),
        ({"LLUMD_TORCH": "tpu"}, "neither cpu nor cuda"),
    ],
)
def test_errors_are_in_plain_words(checkout, env, message):
    status, output, calls = checkout.run("serve", **env)
    assert status == 1 and message in output and not installs(calls)


def test_llumctl_does_not_set_up(checkout):
    status, output, calls = checkout.run("llumctl", "ps")
    assert status == 1 and "not set up yet" in output and calls == []
    checkout.run("serve")
    assert checkout.run("llumctl", "ps")[2] == ["python -P -m daemon.cli.llumctl ps"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_accepts_the_scripts():
    scripts = [ROOT / "bin" / name for name in SCRIPTS] + [ROOT / ".ci" / "run"]
    command = ["shellcheck", "-x", "-P", str(ROOT / "bin"), *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
