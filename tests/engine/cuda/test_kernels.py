"""Kernels compiled ahead of time: the right ones, complete or not at all, loaded by FlashInfer without a compiler."""

import ast
import errno
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from daemon.cli import llumd
from daemon.engine.cuda import compile as compiler
from daemon.engine.cuda import kernels
from daemon.engine.cuda import toolkit as toolkits
from daemon.engine.cuda.kernels import KernelError, KernelSpec
from daemon.ipc.child import EXIT_CONFIG
from daemon.models.architecture import ExpertsConfig, LayerConfig, RopeConfig
from daemon.models.model_config import read_model_config
from tests.models.tiny_model import make_tiny_llama

pytestmark = pytest.mark.integration

NORM = KernelSpec("norm", "RMSNorm", "norm")

# Replaces nvcc: answers queries, and compiles everything to an empty object. FAKE selects an error.
NVCC = r"""#!/usr/bin/env bash
case "$*" in
*--version*) echo "Cuda compilation tools, release ${NVCC_VERSION:-13.0}, V13.0.88"; exit ;;
*--list-gpu-arch*) printf 'compute_80\ncompute_90\ncompute_100\n'; exit ;;
*--dryrun*) echo "#$ _HERE_=$(dirname "$0")"; exit ;;
esac
echo "$*" >>"$CALLS"
case "$FAKE" in
broken) echo "norm.cu(7): error: identifier \"norn\" is undefined"; exit 2 ;;
full) echo "fatal error: error writing to /tmp/x: No space left on device"; exit 1 ;;
killed) echo "sh: line 1: 99 Killed  cicc"; exit 137 ;;
lacking) echo "norm.cu:3:10: fatal error: curand_kernel.h: No such file or directory"; exit 1 ;;
new) echo "host_config.h:42:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not \
supported! The nvcc flag ..."; exit 1 ;;
blocked) read -r <"$GATE" ;;
esac
while [[ $1 != -o ]]; do shift; done
c++ -fPIC -x c++ -c /dev/null -o "$2"
"""


@pytest.fixture
def config(tmp_path):
    return read_model_config(make_tiny_llama(tmp_path / "tiny", head_dim=64, weights=False))


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit with a replacement of nvcc; returns the file that records its calls."""
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    home, calls = tmp_path / "toolkit", tmp_path / "calls"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "bin" / "nvcc").write_text(NVCC)
    (home / "bin" / "nvcc").chmod(0o755)
    library = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", home / "lib" / "libcudart.so.13"]
    subprocess.run(library, check=True)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("FAKE", "")
    return calls


def build(where, specs=(NORM,), arch="9.0a"):
    messages = []
    made = compiler.build(specs, arch, where, messages.append, jobs=1)
    return [spec.name for spec in made], "\n".join(messages)


def put(where, name="norm", nvcc="13.0"):
    """Write a complete module, as after a build."""
    (where / name).mkdir(parents=True)
    (where / name / f"{name}.so").write_bytes(b"library")
    record = {"size": 7, "nvcc": nvcc, "tvm_ffi": importlib.metadata.version("apache-tvm-ffi")}
    (where / name / kernels.RECORD).write_text(json.dumps(record))


def names(specs):
    return [spec.name for spec in specs]


def attention_specs(config):
    return [spec for spec in kernels.required(config, arch="9.0a") if spec.generator == "attention"]


def attention(specs):
    return [spec.args for spec in specs if spec.generator == "attention"]


# -- required kernels


@pytest.mark.parametrize(
    ("head_dim", "options", "expected"),
    [
        (64, {}, [("fa2", "bf16", "bf16", 64, False, False)]),
        (128, {"dtype": "fp16"}, [("fa2", "f16", "f16", 128, False, False)]),
        (96, {}, [("fa2", "bf16", "bf16", 128, False, False)]),
        (128, {"kv_dtype": "fp8"}, [("fa2", "bf16", "e4m3", 128, False, False)]),
        (
            256,
            {"prefill": "fa3"},
            [("fa2", "bf16", "bf16", 256, False, False), ("fa3", "bf16", "bf16", 256, False, False)],
        ),
    ],
)
def test_attention_is_compiled_for_the_dtypes_and_head_dim_of_the_model(config, head_dim, options, expected):
    specs = kernels.required(replace(config, head_dim=head_dim), arch="9.0a", **options)
    assert attention(specs) == expected
    ours = {spec().name for spec in (kernels.silu, kernels.sampler, kernels.append, kernels.gemv)}
    assert {"norm"} | ours < set(names(specs))


def test_heads_that_are_normalised_are_not_widened(config):
    with pytest.raises(KernelError, match="head_dim 64, 128, 256, not 80"):
        kernels.required(replace(config, head_dim=80, qk_norm="head"), arch="9.0a")


WINDOW_IN_ONE_LAYER = {"layers": (LayerConfig(), LayerConfig(window=40))}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (WINDOW_IN_ONE_LAYER, ("fa2", "bf16", "bf16", 64, True, False)),
        ({"attention_softcap": 50.0}, ("fa2", "bf16", "bf16", 64, False, True)),
        ({**WINDOW_IN_ONE_LAYER, "attention_softcap": 50.0}, ("fa2", "bf16", "bf16", 64, True, True)),
    ],
)
def test_all_layers_of_a_model_use_one_attention_kernel(config, changes, expected):
    specs = kernels.required(replace(config, **changes), arch="8.9")
    assert attention(specs) == [expected]
    assert set(names(specs)) <= kernels.known_names()
    with pytest.raises(KernelError, match="fa3 prefill is for models without sliding windows"):
        kernels.required(replace(config, **changes), arch="9.0a", prefill="fa3")


@pytest.mark.parametrize(("arch", "served"), [("9.0a", True), ("10.0a", True), ("8.0", False), ("12.0f", False)])
def test_experts_need_a_gpu_with_grouped_products(config, arch, served):
    mixture = replace(config, experts=ExpertsConfig(count=4, per_token=2, width=64, normalise=True))
    if served:
        assert names(kernels.required(mixture, arch=arch)) == names(kernels.required(config, arch=arch))
    else:
        with pytest.raises(KernelError, match=f"mixture of experts needs .* 9.0 or 10.0.* not {arch}"):
            kernels.required(mixture, arch=arch)


def test_a_rope_that_the_append_kernel_cannot_rotate_is_rejected(config):
    with pytest.raises(KernelError, match="multiples of 16 elements of a head, not 24"):
        kernels.required(replace(config, ropes=(RopeConfig(1e4, 24),)), arch="9.0a")


@pytest.mark.parametrize(
    ("head_dim", "arch", "options", "words"),
    [
        (272, "9.0a", {}, "head_dim 64, 128, 256, not 272"),
        (64, "8.9", {"prefill": "fa3"}, "not for 8.9"),
        (64, "10.0a", {"prefill": "fa3"}, "9.0a only"),
        (64, "9.0a", {"prefill": "fa3", "kv_dtype": "fp8"}, "cannot read an fp8"),
    ],
)
def test_a_configuration_without_kernels_is_rejected(config, head_dim, arch, options, words):
    with pytest.raises(KernelError, match=words):
        kernels.required(replace(config, head_dim=head_dim), arch=arch, **options)


def test_flashinfer_has_the_same_names_for_all_kernels(config, toolkit, tmp_path):
    specs = kernels.required(config, arch="9.0a", prefill="fa3")
    specs += [s for s in kernels.required(config, arch="9.0a", kv_dtype="fp8") if s not in specs]
    specs += attention_specs(replace(config, attention_softcap=50.0))
    specs += attention_specs(replace(config, **WINDOW_IN_ONE_LAYER))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = compiler._environment(toolkits.toolchain(), "9.0a", scratch)
    with (tmp_path / "lock").open("w") as lock:
        files = compiler._generate(specs, scratch, env, lock.fileno())
    assert list(files) == names(specs) and len(set(names(specs))) == len(specs)
    # The noise is exact only without contraction and without the fast approximations that FlashInfer enables.
    flags = Path(files[kernels.sampler().name]).read_text()
    assert "-fmad=false" in flags and "fast_math" not in flags and "code=sm_90a" in flags
    assert "-fmad=false" in Path(files[kernels.append().name]).read_text()
    assert "fast_math" not in Path(files[kernels.gemv().name]).read_text()


@pytest.mark.parametrize(("module", "header"), [("sampler", "row.h"), ("append", "append.h"), ("gemv", "gemv.h")])
def test_the_name_of_our_own_kernel_changes_only_with_its_sources(tmp_path, monkeypatch, module, header):
    spec_of, unit = getattr(kernels, module), f"{module}.cu"
    for source in kernels._SOURCES.iterdir():
        if source.suffix in (".h", ".cu", ".cuh"):
            shutil.copy(source, tmp_path)
    monkeypatch.setattr(kernels, "_SOURCES", tmp_path)
    before = spec_of()
    assert before.args[0] == str(tmp_path / unit)
    (tmp_path / "another.cu").write_text("of another module")
    assert spec_of() == before
    found = {before.name}
    for file in (header, unit, "host_device.h"):
        (tmp_path / file).write_text("changed")
        found.add(spec_of().name)
    assert len(found) == 4
    (tmp_path / header).unlink()
    with pytest.raises(KernelError, match=f"{header} is missing; install llumd again"):
        spec_of()


@pytest.mark.parametrize(
    ("text", "arch"),
    [("9.0", "9.0a"), ("9.0a", "9.0a"), ("8.9", "8.9"), ("10.0", "10.0a"), ("12.0", "12.0f"), (" 12.1 ", "12.1a")],
)
def test_architectures_are_written_as_flashinfer_writes_them(text, arch):
    assert kernels.parse_arch(text) == arch


@pytest.mark.parametrize("text", ["", "90", "sm_90a", "9.0b", "9", "hopper", "7.5"])
def test_an_invalid_architecture_is_rejected(text):
    with pytest.raises(KernelError):
        kernels.parse_arch(text)


# -- compiling


def test_a_kernel_is_compiled_once(toolkit, tmp_path):
    where = tmp_path / "kernels"
    made, output = build(where)
    assert made == ["norm"] and "[1/1] RMSNorm" in output and "MiB" in output
    assert kernels.missing([NORM], where) == []
    assert "code=sm_90a" in toolkit.read_text()
    toolkit.write_text("")
    assert build(where)[0] == [] and toolkit.read_text() == ""
    assert sorted(f.name for f in where.iterdir()) == [".lock", "norm"]


def test_another_nvcc_compiles_again(toolkit, tmp_path, monkeypatch):
    put(tmp_path / "kernels")
    assert build(tmp_path / "kernels")[0] == []
    monkeypatch.setenv("NVCC_VERSION", "13.1")
    assert build(tmp_path / "kernels")[0] == ["norm"]
    assert kernels.find(tmp_path / "kernels", "norm").nvcc == "13.1"


@pytest.mark.parametrize("damage", ["truncated", "no record", "broken record", "old record", "no library"])
def test_an_incomplete_module_is_missing(tmp_path, damage):
    where = tmp_path / "kernels"
    put(where)
    assert kernels.missing([NORM], where) == []
    library, record = where / "norm" / "norm.so", where / "norm" / kernels.RECORD
    match damage:
        case "truncated":
            os.truncate(library, 6)
        case "no record":
            record.unlink()
        case "broken record":
            record.write_text('{"size": ')
        case "old record":
            record.write_text('{"size": 7}')
        case "no library":
            library.unlink()
    assert kernels.missing([NORM], where) == [NORM]


def test_a_damaged_module_is_compiled_again(toolkit, tmp_path):
    where = tmp_path / "kernels"
    put(where)
    (where / "norm" / kernels.RECORD).unlink()
    assert build(where)[0] == ["norm"] and kernels.missing([NORM], where) == []


def opened(gate, build):
    """Wait until the compiler of the process `build` reads from the pipe `gate`, and return the other end."""
    while True:
        try:
            fd = os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as e:
            assert e.errno == errno.ENXIO and build.poll() is None, "the build ended before it compiled"
            time.sleep(0.02)
        else:
            os.set_blocking(fd, True)
            return os.fdopen(fd, "w")


def release_all(gate, release):
    """Let all compilers end: those that read from the pipe, and those that start later."""
    gate.unlink()
    gate.touch()
    release.close()


def test_a_killed_build_leaves_nothing_and_the_next_one_waits_for_its_compiler(toolkit, tmp_path, monkeypatch):
    where, gate = tmp_path / "kernels", tmp_path / "gate"
    os.mkfifo(gate)
    program = (
        "import sys; from pathlib import Path; from daemon.engine.cuda import compile, kernels\n"
        f"compile.build([kernels.{NORM}], '9.0a', Path(sys.argv[1]), print)"
    )
    env = os.environ | {"FAKE": "blocked", "GATE": str(gate)}
    first = subprocess.Popen([sys.executable, "-c", program, where], env=env, stdout=subprocess.DEVNULL)
    release = opened(gate, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert kernels.missing([NORM], where) == [NORM]
    messages = []

    def on_message(text):
        messages.append(text)
        if "waiting for another build" in text:
            release_all(gate, release)

    compiler.build([NORM], "9.0a", where, on_message, jobs=1)
    assert "waiting for another build" in messages[0]
    assert kernels.missing([NORM], where) == []


COMMAND = "import sys; from daemon.cli import llumd; llumd.main(sys.argv[1:])"


def test_a_signal_ends_the_build_with_its_compilers(config, toolkit, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    env = os.environ | {"FAKE": "blocked", "GATE": str(gate), "LLUMD_KERNELS": str(tmp_path / "kernels")}
    command = [sys.executable, "-c", COMMAND, "kernels", "build", str(config.path), "--arch", "9.0"]
    build = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    release = opened(gate, build)
    build.terminate()
    assert "stopped" in build.communicate(timeout=60)[1] and build.returncode == 130
    with pytest.raises(BrokenPipeError):  # the compiler is gone
        os.write(release.fileno(), b"\n")
    release.close()
    (where,) = (f for f in (tmp_path / "kernels").iterdir())
    assert [f.name for f in where.iterdir()] == [".lock"]


def test_of_two_builds_at_the_same_time_only_one_compiles(toolkit, tmp_path):
    where, gate = tmp_path / "kernels", tmp_path / "gate"
    os.mkfifo(gate)
    program = (
        "import sys; from pathlib import Path; from daemon.engine.cuda import compile, kernels\n"
        "compile.build([kernels.silu()], '9.0a', Path(sys.argv[1]), print)"
    )
    env = os.environ | {"FAKE": "blocked", "GATE": str(gate)}
    first = subprocess.Popen([sys.executable, "-c", program, where], env=env, stdout=subprocess.DEVNULL)
    release = opened(gate, first)

    def on_message(text):
        if "waiting for another build" in text:
            release_all(gate, release)

    assert compiler.build([kernels.silu()], "9.0a", where, on_message, jobs=1) == []
    assert first.wait(60) == 0 and len(toolkit.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ("broken", 'error: identifier "norn" is undefined'),
        ("full", "is full"),
        ("killed", "kernels build --jobs 1"),
        ("lacking", "neither the CUDA toolkit nor the C\\+\\+ compiler has curand_kernel.h"),
        ("new", "versions later than 15 are not supported.*CXX=g"),
    ],
)
def test_the_error_of_a_failed_compilation_names_the_cause(toolkit, tmp_path, monkeypatch, fake, words):
    monkeypatch.setenv("FAKE", fake)
    where = tmp_path / "kernels"
    with pytest.raises(KernelError, match=words) as caught:
        build(where)
    assert kernels.missing([NORM], where) == [NORM] and not (where / ".unfinished").exists()
    if fake == "broken":
        assert str(where / "norm.log") in str(caught.value)
        assert "norn" in (where / "norm.log").read_text()


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("nvcc", "CUDA_HOME is"),
        ("ninja", "pip install ninja"),
        ("c++", "install g"),
        ("arch", "it supports 8.0, 9.0, 10.0"),
    ],
)
def test_a_missing_tool_is_named_before_anything_is_compiled(toolkit, tmp_path, monkeypatch, lacking, words):
    arch = "8.6" if lacking == "arch" else "9.0a"
    if lacking == "nvcc":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    elif lacking != "arch":
        found = shutil.which
        monkeypatch.setattr(shutil, "which", lambda cmd, *a, **k: None if cmd == lacking else found(cmd, *a, **k))
        monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match=words):
        build(tmp_path / "kernels", arch=arch)
    assert not (tmp_path / "kernels").exists()


def test_the_error_for_an_unusable_directory_names_the_setting(toolkit, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="LLUMD_KERNELS"):
        build(tmp_path / "file" / "kernels")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_during_installation_is_reported(toolkit, tmp_path, monkeypatch):
    def no_room(_source, _target):
        with open("/dev/full", "wb", buffering=0) as f:
            f.write(b"x")

    monkeypatch.setattr(shutil, "copyfile", no_room)
    with pytest.raises(KernelError, match=r"is full .* another directory"):
        build(tmp_path / "kernels")
    assert kernels.missing([NORM], tmp_path / "kernels") == [NORM]


# -- the command


def test_the_command_builds_the_kernels_of_a_model_and_lists_them(config, toolkit, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLUMD_KERNELS", str(tmp_path / "kernels"))
    command = ["kernels", "build", str(config.path), "--arch", "9.0"]
    with pytest.raises(SystemExit) as done:
        llumd.main(command)
    assert done.value.code == 0
    specs = kernels.required(config, arch="9.0a")
    assert kernels.check(specs, "9.0a") == kernels.directory("9.0a")
    with pytest.raises(SystemExit):
        llumd.main(["kernels", "list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in names(specs))


@pytest.mark.parametrize(
    ("args", "words"),
    [([], "name the architecture"), (["--arch", "sm_90"], "not a GPU architecture"), (["--arch", "7.0"], "8.0")],
)
def test_the_command_names_the_error(config, monkeypatch, capsys, args, words):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi, so no GPU is found
    with pytest.raises(SystemExit) as done:
        llumd.main(["kernels", "build", str(config.path), *args])
    assert done.value.code == EXIT_CONFIG and words in capsys.readouterr().err


def test_missing_kernels_are_named_with_the_build_command(config, tmp_path, monkeypatch):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    monkeypatch.setenv("LLUMD_KERNELS", str(tmp_path))
    specs = kernels.required(config, arch="9.0a")
    with pytest.raises(KernelError) as caught:
        kernels.check(specs, "9.0a")
    message = str(caught.value)
    assert all(name in message for name in names(specs)) and "llumd kernels build --arch 9.0a" in message


# -- FlashInfer

LOAD = """
import ctypes, sys
from pathlib import Path
from daemon.engine.cuda import kernels
from daemon.engine.cuda import toolkit as toolkits
kernels.use(Path(sys.argv[1]))
from flashinfer.jit.activation import gen_act_and_mul_module
from flashinfer.jit.norm import gen_norm_module
from flashinfer.jit.core import MissingJITCacheError
spec = gen_norm_module()
print(spec.is_aot, spec.get_library_path())
try:
    gen_act_and_mul_module("gelu").build_and_load()
except MissingJITCacheError:
    print("not compiled")
if "load" in sys.argv:
    print("loaded", callable(kernels.load_silu().silu_mul))
"""


def load(where, tmp_path, *args):
    """Load modules in a process without a compiler on PATH, as on a machine that only serves."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    env |= {"PATH": "", "LLUMD_CACHE": str(tmp_path / "cache"), "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
    command = [sys.executable, "-c", LOAD, where, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_flashinfer_loads_compiled_modules_and_compiles_nothing(tmp_path):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    where = tmp_path / "kernels"
    put(where)
    assert load(where, tmp_path) == [f"True {where}/norm/norm.so", "not compiled"]


def test_kernels_for_another_cuda_version_are_rejected(tmp_path, monkeypatch):
    put(tmp_path / "kernels")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    with pytest.raises(KernelError, match=r"CUDA 13\.0, PyTorch here has 12\.8"):
        kernels.use(tmp_path / "kernels")
    with pytest.raises(KernelError, match=r"CUDA 13\.0, PyTorch here has 12\.8"):
        kernels.use(tmp_path / "kernels", [NORM])


def test_kernels_for_another_cuda_version_do_not_disturb_those_that_are_used(tmp_path, monkeypatch):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    put(tmp_path / "kernels")
    put(tmp_path / "kernels", "old", nvcc="12.8")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    kernels._check_cuda(tmp_path / "kernels", [NORM])
    assert kernels.missing([NORM], tmp_path / "kernels", "13.2") == []
    assert kernels.missing([NORM], tmp_path / "kernels", "12.8") == [NORM]


def has_nvcc():
    try:
        toolkits.toolchain()
    except KernelError:
        return False
    return True


@pytest.mark.skipif(not has_nvcc(), reason="no nvcc")
def test_a_real_kernel_is_compiled_without_a_gpu_and_loaded(tmp_path):
    pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    where, spec = tmp_path / "kernels", kernels.silu()
    build(where, [spec])
    library = where / spec.name / f"{spec.name}.so"
    assert b"silu_mul_kernel" in library.read_bytes() and b"sm_90a" in library.read_bytes()
    missing_runtime = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    if "libcudart.so.13 => not found" not in missing_runtime:
        assert load(where, tmp_path, "load")[-1] == "loaded True"


# -- the calls of FlashInfer in attention.py and ops.py

WRAPPER_CALLS = {
    "BatchDecodeWithPagedKVCacheWrapper.plan": "indptr indices last_page_len num_qo_heads num_kv_heads head_dim "
    "page_size q_data_type kv_data_type o_data_type non_blocking",
    "BatchPrefillWithPagedKVCacheWrapper.plan": "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len "
    "num_qo_heads num_kv_heads head_dim_qk page_size causal q_data_type kv_data_type o_data_type non_blocking",
}


def source(module):
    return (Path(kernels.__file__).parent / f"{module}.py").read_text()


def flashinfer_calls():
    """Yield (name, number of positional arguments, names of the others) of each call `self._fi.NAME(...)`."""
    for module in ("attention", "ops"):
        for node in ast.walk(ast.parse(source(module))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func).startswith("self._fi."):
                keywords = [k.arg for k in node.keywords if k.arg]
                yield pytest.param(node.func.attr, len(node.args), keywords, id=node.func.attr)


@pytest.mark.parametrize(("name", "positional", "keywords"), list(flashinfer_calls()))
def test_flashinfer_accepts_our_calls(name, positional, keywords):
    flashinfer = pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    inspect.signature(getattr(flashinfer, name)).bind(*[None] * positional, **dict.fromkeys(keywords))


@pytest.mark.parametrize("method", WRAPPER_CALLS)
def test_flashinfers_wrappers_have_the_parameters(method):
    flashinfer = pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    wrapper, name = method.split(".")
    parameters = inspect.signature(getattr(getattr(flashinfer, wrapper), name)).parameters
    assert [p for p in WRAPPER_CALLS[method].split() if p not in parameters] == []


def test_flashinfers_wrappers_have_the_private_attributes_that_we_use():
    flashinfer = pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    inside = inspect.getsource(flashinfer.BatchPrefillWithPagedKVCacheWrapper)
    used = set(re.findall(r"wrapper\.(_\w+)", source("attention")))
    assert "_cached_module" in used
    assert [name for name in used if f"self.{name}" not in inside] == []


def test_the_native_plan_takes_as_many_arguments_as_we_pass():
    flashinfer = pytest.importorskip("flashinfer", reason="the extra `flashinfer` is not installed")
    binding = Path(flashinfer.__file__).parent / "data" / "csrc" / "batch_prefill_jit_binding.cu"
    plan = re.search(r"BatchPrefillWithKVCachePlan\(([^)]*)\);", binding.read_text())
    given = 0
    for node in ast.walk(ast.parse(source("attention"))):
        if isinstance(node, ast.Assign | ast.AugAssign) and "arguments = [" in ast.unparse(node).replace("+=", "="):
            assert isinstance(node.value, ast.List)
            given += len(node.value.elts)
    assert given == plan[1].count(",") + 1
