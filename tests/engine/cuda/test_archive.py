"""Archives of compiled kernels: what is packed arrives unchanged, and nothing else is taken."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import llumd
from daemon.engine.cuda import archive, kernels
from daemon.engine.cuda.kernels import KernelError
from daemon.ipc.child import EXIT_CONFIG

pytestmark = pytest.mark.unit

ATTENTION = sorted(n for n in kernels.known_names() if "head_dim_qk_64" in n)[0]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels of this machine, which has FlashInfer 0.6.8."""
    monkeypatch.setattr(kernels, "flashinfer_version", lambda: "0.6.8")
    return move_to(tmp_path / "here", monkeypatch)


def move_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLUMD_KERNELS", str(root))
    return root


def put(arch: str, name: str, content: bytes, nvcc: str = "13.0") -> Path:
    """Write a complete module, as after a build."""
    folder = kernels.directory(arch) / name
    folder.mkdir(parents=True)
    (folder / f"{name}.so").write_bytes(content)
    (folder / kernels.RECORD).write_text(json.dumps({"size": len(content), "nvcc": nvcc, "tvm_ffi": "0.1.15"}))
    return folder / f"{name}.so"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    put("9.0a", "norm", b"norm of 9.0a")
    put("9.0a", ATTENTION, b"attention" * 1000)
    put("8.9", "norm", b"norm of 8.9", nvcc="13.1")
    put("9.0a", "llumd_gemv_0123456789ab", b"of another version of llumd")
    assert archive.pack(tmp_path / "kernels.tar.xz", [], print) == 3
    return tmp_path / "kernels.tar.xz"


@pytest.mark.parametrize("suffix", ["tar.xz", "tar.gz"])
def test_kernels_arrive_as_they_were_packed(packed: Path, tmp_path: Path, monkeypatch, suffix: str):
    file = tmp_path / f"again.{suffix}"
    archive.pack(file, [], print)
    sources = kernels.listing(kernels.kernels_dir())
    there = move_to(tmp_path / "there", monkeypatch)
    assert archive.unpack(file, print) == 3
    found = kernels.listing(there)
    assert sorted(folder.name for folder in found) == ["0.6.8-8.9", "0.6.8-9.0a"]
    for where, modules in found.items():
        source = next(folder for folder in sources if folder.name == where.name)
        assert set(modules) <= set(sources[source])
        for built in modules:
            name = Path(built.name) / f"{built.name}.so"
            assert (where / name).read_bytes() == (source / name).read_bytes()
    assert sorted(f.name for f in there.iterdir()) == [".lock", "0.6.8-8.9", "0.6.8-9.0a"]


def test_what_is_there_already_stays(packed: Path, tmp_path: Path, monkeypatch):
    move_to(tmp_path / "there", monkeypatch)
    own = put("9.0a", "norm", b"our own")
    messages: list[str] = []
    assert archive.unpack(packed, messages.append) == 2
    assert own.read_bytes() == b"our own" and "9.0a/norm.so is already there" in messages
    assert archive.unpack(packed, print) == 0


def test_equal_kernels_give_an_equal_file(packed: Path, tmp_path: Path):
    for suffix in ("tar.xz", "tar.gz"):
        one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
        archive.pack(one, [], print)
        archive.pack(two, [], print)
        assert one.read_bytes() == two.read_bytes()


def test_architectures_can_be_chosen(packed: Path, tmp_path: Path):
    assert archive.pack(tmp_path / "one.tar.gz", ["8.9"], print) == 1
    with pytest.raises(KernelError, match=r"no kernels for 12\.0f in .*kernels build"):
        archive.pack(tmp_path / "two.tar.gz", ["8.9", "12.0f"], print)
    with pytest.raises(KernelError, match=r"ends in \.tar\.xz or \.tar\.gz"):
        archive.pack(tmp_path / "kernels.zip", [], print)
    assert not (tmp_path / "two.tar.gz").exists()


def test_a_file_that_cannot_be_written_is_named(packed: Path, tmp_path: Path):
    with pytest.raises(KernelError, match=r"cannot write .*nowhere"):
        archive.pack(tmp_path / "nowhere" / "k.tar.xz", [], print)


# -- archives that are refused

Member = tuple[tarfile.TarInfo, bytes]
Change = Callable[[dict[str, Any], list[Member]], None]


def forge(source: Path, target: Path, change: Change) -> None:
    """Write the archive again, after `change` has changed its manifest and its other members."""
    with tarfile.open(source) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]
    manifest = json.loads(members[0][1])
    rest = members[1:]
    change(manifest, rest)
    with tarfile.open(target, "w:gz") as tar:
        for member, content in [(tarfile.TarInfo("manifest.json"), json.dumps(manifest).encode()), *rest]:
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def other_flashinfer(manifest, _members):
    manifest["flashinfer"] = "0.7.0"


def other_format(manifest, _members):
    manifest["format"] = 2


def lacking_field(manifest, _members):
    del manifest["kernels"][0]["sha256"]


def path_as_name(manifest, members):
    manifest["kernels"][0]["name"] = "../../../etc/norm"
    members[0][0].name = f"{manifest['kernels'][0]['arch']}/../../../etc/norm.so"


def path_as_arch(manifest, members):
    manifest["kernels"][0]["arch"] = "../9.0a"
    members[0][0].name = f"../9.0a/{manifest['kernels'][0]['name']}.so"


def named_twice(manifest, _members):
    manifest["kernels"].append(manifest["kernels"][0])


def outside(_manifest, members):
    members.append((tarfile.TarInfo("../outside.so"), b"x"))


def absolute(_manifest, members):
    members.append((tarfile.TarInfo("/tmp/outside.so"), b"x"))


def link(_manifest, members):
    info = tarfile.TarInfo(members[0][0].name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members[0] = (info, b"")


def hard_link(_manifest, members):
    info = tarfile.TarInfo(members[1][0].name)
    info.type, info.linkname = tarfile.LNKTYPE, members[0][0].name
    members[1] = (info, b"")


def unknown_file(_manifest, members):
    members.append((tarfile.TarInfo("9.0a/readme.txt"), b"hello"))


def other_content(_manifest, members):
    info, content = members[0]
    members[0] = (info, bytes([content[0] ^ 1]) + content[1:])


def incomplete(_manifest, members):
    members.pop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_flashinfer, r"kernels of FlashInfer 0\.7\.0, here FlashInfer is 0\.6\.8"),
        (other_format, "has format 2, this llumd reads format 1"),
        (lacking_field, "manifest.json is damaged"),
        (path_as_name, "an entry that is no kernel"),
        (path_as_arch, "not a GPU architecture"),
        (named_twice, "names a kernel twice"),
        (outside, r"holds '\.\./outside\.so', which"),
        (absolute, "holds '/tmp/outside.so', which"),
        (link, "does not list as a library"),
        (hard_link, "does not list as a library"),
        (unknown_file, "readme.txt"),
        (other_content, "is damaged: its SHA-256"),
        (incomplete, "is not complete: it has no"),
    ],
)
def test_a_bad_archive_is_refused_and_nothing_of_it_is_kept(packed, tmp_path, monkeypatch, change, words):
    forge(packed, tmp_path / "bad.tar.gz", change)
    there = move_to(tmp_path / "there" / "kernels", monkeypatch)
    with pytest.raises(KernelError, match=words):
        archive.unpack(tmp_path / "bad.tar.gz", print)
    assert [f.name for f in there.iterdir()] == [".lock"]
    assert [f.name for f in (tmp_path / "there").iterdir()] == ["kernels"]


@pytest.mark.parametrize("kind", ["cut short", "no archive", "other archive", "missing", "directory"])
def test_a_file_that_is_no_archive_is_named(packed, tmp_path, monkeypatch, capsys, kind):
    file = tmp_path / "bad.tar.xz"
    match kind:
        case "cut short":
            file.write_bytes(packed.read_bytes()[:-200])
        case "no archive":
            file.write_bytes(b"hello" * 1000)
        case "other archive":
            with tarfile.open(file, "w:xz") as tar:
                tar.addfile(tarfile.TarInfo("readme.txt"))
        case "directory":
            file.mkdir()
    there = move_to(tmp_path / "there", monkeypatch)
    with pytest.raises(SystemExit) as done:
        llumd.main(["kernels", "unpack", str(file)])
    message = capsys.readouterr().err
    assert done.value.code == EXIT_CONFIG and message.startswith("llumd: ") and str(file) in message
    assert [f.name for f in there.iterdir()] == [".lock"]


def test_the_commands_pack_and_unpack(packed, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        llumd.main(["kernels", "pack", str(tmp_path / "one.tar.gz"), "--arch", "9.0"])
    assert done.value.code == 0 and "2 kernels are in" in capsys.readouterr().out
    move_to(tmp_path / "there", monkeypatch)
    with pytest.raises(SystemExit) as done:
        llumd.main(["kernels", "unpack", str(tmp_path / "one.tar.gz")])
    assert done.value.code == 0 and "2 new kernels are in" in capsys.readouterr().out
