"""`llumd models`, `llumd pull` and `llumd rm`: what is on this machine, how large it is, and how it goes away."""

from __future__ import annotations

import json

import pytest

from daemon.cli.llumd import main
from daemon.models import store
from daemon.models.hub import cache
from daemon.models.locks import in_use
from tests.models.gguf.tiny_gguf import make_tiny_gguf
from tests.models.hub.stand_in import hub_of_a_test
from tests.models.tiny_model import make_tiny_llama

NAME = "tiny-org/Tiny-1B"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_of_a_test(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def llumd(capsys):
    """Return a function that runs `llumd` with arguments and returns (exit code, stdout, stderr)."""

    def run(*arguments: str):
        with pytest.raises(SystemExit) as e:
            main(arguments)
        return (e.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def listed(llumd):
    return lambda: {e["name"]: e for e in json.loads(llumd("models", "--json")[1])}


def test_pull_models_rm(hub, llumd, listed, tmp_path):
    model = make_tiny_llama(tmp_path / "m")
    repo = hub.add(NAME, model)
    assert llumd("models") == (0, "no models on this machine; `llumd pull ORG/NAME` downloads one\n", "")
    code, out, err = llumd("pull", NAME)
    assert code == 0 and err.startswith(f"downloading {NAME}")
    assert out == f"{NAME} is in {store.resolve(NAME, 'auto', print)}\n"
    entry = listed()[NAME]
    assert (entry["revision"], entry["commit"]) == ("main", repo.branches["main"])
    assert entry["size"] == sum(f.stat().st_size for f in model.iterdir())
    assert entry["complete"] and not entry["in_use"]
    heading, row = llumd("models")[1].splitlines()
    assert heading.split("  ")[0] == "NAME"
    assert row.split()[:3] == [NAME, "main", entry["commit"][:12]] and row.endswith("ready")
    code, out, _ = llumd("rm", NAME)
    assert (code, out) == (0, f"removed {NAME}: 0.00 GB are free again\n")
    assert listed() == {}
    assert not list((tmp_path / "hf" / "hub").glob("models--*")) and cache.pins() == []
    assert llumd("rm", NAME) == (
        78,
        "",
        f"llumd: {NAME} is not among the models on this machine; `llumd models` lists them\n",
    )


def test_what_a_daemon_serves_is_not_removed(hub, llumd, listed, tmp_path):
    hub.add(NAME, make_tiny_llama(tmp_path / "m"))
    path = store.resolve(NAME, "auto", str)
    with in_use(path):
        assert listed()[NAME]["in_use"]
        code, _, err = llumd("rm", NAME)
        assert (code, err) == (78, f"llumd: a daemon serves {NAME} now; stop it before you remove the model\n")
    assert llumd("rm", NAME)[0] == 0


def test_one_revision_is_removed_and_the_other_stays(hub, llumd, listed, tmp_path):
    repo = hub.add(NAME, make_tiny_llama(tmp_path / "m"))
    old = store.resolve(NAME, "auto", str)
    repo.commit(repo.commits[old.name] | {"generation_config.json": b"{}"})
    new = store.pull(NAME, str)
    assert listed().keys() == {NAME, f"{NAME}@{old.name}"}
    assert llumd("rm", f"{NAME}@{old.name}")[0] == 0
    assert not old.exists()
    assert store.resolve(NAME, "auto", str) == new


def test_gguf_files_and_what_was_converted_from_them(hub, llumd, listed, tmp_path):
    make_tiny_gguf(tmp_path / "g.gguf")
    content = (tmp_path / "g.gguf").read_bytes()
    hub.add(NAME, {"tiny-Q4_0.gguf": content, "tiny-Q8_0.gguf": content + b"\0"})
    paths = [store.resolve(f"{NAME}:{kind}", "auto", str) for kind in ("Q4_0", "Q8_0")]
    local = store.resolve(str(tmp_path / "g.gguf"), "auto", str)
    four, eight = f"{NAME}:tiny-Q4_0.gguf", f"{NAME}:tiny-Q8_0.gguf"
    assert listed().keys() == {four, eight, str(tmp_path / "g.gguf")}
    assert llumd("rm", f"{NAME}:q4_0")[0] == 0
    assert listed().keys() == {eight, str(tmp_path / "g.gguf")}
    assert [p.exists() for p in (*paths, local)] == [False, True, True]
    assert llumd("rm", NAME)[0] == 0
    assert llumd("rm", str(tmp_path / "g.gguf"))[0] == 0
    assert listed() == {} and not local.exists()


def test_an_unfinished_download_is_shown_as_such(hub, llumd, listed, tmp_path):
    hub.add(NAME, make_tiny_llama(tmp_path / "m"))
    path = store.resolve(NAME, "dummy", str)
    (path.parents[1] / "blobs" / "0.llumd.incomplete").write_bytes(bytes(10**6))
    entry = listed()[NAME]
    assert not entry["complete"] and entry["size"] > 10**6
    assert llumd("models")[1].rstrip().endswith("incomplete")
    assert llumd("rm", NAME)[0] == 0
    assert not path.parents[1].exists()
