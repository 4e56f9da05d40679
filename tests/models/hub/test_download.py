"""Models by name, against a stand-in for the hub: one pinned commit, right files, errors that say what to do."""

import json
import signal
import subprocess
import sys
import time

import pytest

from daemon.models import store
from daemon.models.files import ModelError
from daemon.models.hub import cache
from daemon.models.hub.name import HubName
from daemon.models.loader import open_model
from daemon.models.tokenizer import Tokenizer
from tests.models.gguf.tiny_gguf import make_tiny_gguf
from tests.models.hub.stand_in import TOKEN
from tests.models.test_sentencepiece_tokenizer import train
from tests.models.tiny_model import make_tiny_llama

NAME = "tiny-org/Tiny-1B"
PART = 10 << 20  # bytes that huggingface_hub writes at once
PULL = "import sys; from daemon.models import store; store.pull(sys.argv[1], print)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), shards=2)


def resolve(model=NAME, load_format="auto"):
    progress: list[str] = []
    return store.resolve(model, load_format, progress.append), progress


def test_a_name_is_downloaded_once_with_the_files_that_it_needs(hub, tiny, tmp_path):
    files = {f.name: f.read_bytes() for f in tiny.iterdir()}
    unwanted = {
        "README.md": b"#",
        "model.py": b"",
        "pytorch_model.bin": b"x",
        "original/a.pth": b"",
        "onnx/a.onnx": b"",
    }
    commit = hub.add(NAME, files | unwanted).branches["main"]
    path, progress = resolve()
    assert path == tmp_path / "hf" / "hub" / "models--tiny-org--Tiny-1B" / "snapshots" / commit
    assert {f.name for f in path.iterdir()} == files.keys()
    assert open_model(path, store.default_name(NAME)).name == NAME
    assert progress[0].startswith(f"downloading {NAME} (commit {commit[:12]}, 0.")
    count = len(hub.requests)
    assert resolve() == (path, [])
    assert len(hub.requests) == count


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model whose weights arrive in more than two of the parts that huggingface_hub writes at once."""
    model = make_tiny_llama(tmp_path_factory.mktemp("long"), hidden=256, vocab=24000, layers=1)
    assert (model / "model.safetensors").stat().st_size > 2 * PART + 10**6
    return model


def test_a_broken_connection_goes_on_where_it_was(hub, long):
    hub.add(NAME, long)
    hub.break_after = [PART + 10**6, PART + 10**6]
    path, progress = resolve()
    open_model(path)
    assert hub.begins["model.safetensors"] == [0, PART, 2 * PART]
    assert sum("Trying to resume" in line for line in progress) == 2


def test_a_killed_download_goes_on_where_it_was(hub, long, tmp_path):
    hub.add(NAME, long)
    hub.stall_after = PART + 10**6
    with subprocess.Popen([sys.executable, "-c", PULL, NAME], stdout=subprocess.DEVNULL) as process:
        blobs = tmp_path / "hf" / "hub" / "models--tiny-org--Tiny-1B" / "blobs"
        for _ in range(600):
            if any(f.stat().st_size >= PART for f in blobs.glob("*.incomplete")):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    hub.stall_after = None
    path, progress = resolve()
    open_model(path)
    assert hub.begins["model.safetensors"] == [0, PART]
    assert "are there from an earlier download" in progress[0]
    assert not list(blobs.glob("*.incomplete"))


def test_a_damaged_part_of_an_earlier_download_is_replaced(hub, tmp_path):
    hub.add(NAME, make_tiny_llama(tmp_path / "m"))
    hub.corrupt = {"model.safetensors": 1, "tokenizer.json": 1}
    path, progress = resolve()
    open_model(path)
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert sum("wrong content" in line for line in progress) == 2


@pytest.mark.parametrize(("file", "digest"), [("model.safetensors", "SHA-256"), ("config.json", "checksum")])
def test_a_wrong_checksum_is_refused(hub, tmp_path, file, digest):
    hub.add(NAME, make_tiny_llama(tmp_path / "m"))
    hub.corrupt = {file: 9}
    with pytest.raises(ModelError, match=rf"{file} of {NAME} has the wrong {digest} .* twice: a proxy or a mirror"):
        resolve()
    assert cache.find(HubName(NAME)) is None


def test_the_token_goes_to_the_hub_only(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add(NAME, make_tiny_llama(tmp_path / "m"), gated=True, private=True)
    open_model(resolve()[0])
    assert hub.tokens == {("hub", f"Bearer {TOKEN}")}
    assert any(path.startswith("cdn:") for path in hub.paths())


def test_refusals_of_the_hub_say_what_to_do(hub, tmp_path, monkeypatch):
    model = make_tiny_llama(tmp_path / "m")
    hub.add("o/gated", model, gated=True)
    hub.add("o/private", model, private=True)
    hub.add("o/open", model)

    def why(name):
        with pytest.raises(ModelError) as e:
            resolve(name)
        return str(e.value)

    end = hub.endpoint
    terms = f"accept its terms at {end}/o/gated, make a token at {end}/settings/tokens, and set HF_TOKEN to it"
    assert why("o/gated") == f"o/gated is gated: {terms}"
    missing = f"no such directory here, and no such repository on {end}, or it is private and HF_TOKEN is not set"
    assert why("o/private") == f"o/private: {missing}; check the spelling"
    assert why("o/nothing") == f"o/nothing: {missing}; check the spelling"
    assert why("o/open@v9") == f"o/open has no revision 'v9' on {end}"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert why("o/open") == (
        f"{end} does not accept your token (HF_TOKEN, or the one of `hf auth login`); make a new one"
    )
    hub.repos["o/open"].branches.clear()
    hub.status = 503
    assert "answers with status 503 now; try again later" in why("o/open")


def test_a_model_in_the_cache_starts_without_a_hub(hub, tiny, monkeypatch):
    hub.add(NAME, tiny)
    path, _ = resolve()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve() == (path, [])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve() == (path, [])
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids to download it"):
        resolve("o/other")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelError, match=r"cannot reach http://127.0.0.1:9 to get o/other: .*HTTPS_PROXY"):
        resolve("o/other")


def test_a_name_keeps_its_commit_until_a_pull(hub, tiny, tmp_path):
    repo = hub.add(NAME, tiny)
    old, _ = resolve()
    files = repo.commits[repo.branches["main"]]
    new = repo.commit(files | {"generation_config.json": b'{"eos_token_id": 1}'})
    assert resolve() == (old, [])
    (old / "model-00001-of-00002.safetensors").unlink()  # a part that is missing comes from the same commit
    assert resolve()[0] == old
    updated = store.pull(NAME, print)
    assert updated.name == new
    assert resolve() == (updated, [])
    assert resolve(f"{NAME}@{old.name}")[0] == old
    assert (tmp_path / "hf/hub/models--tiny-org--Tiny-1B/refs/main").read_text() == new


def test_other_tools_and_llumd_share_files(hub, tiny, monkeypatch):
    """A model that huggingface_hub has downloaded needs no second download, and the other way round."""
    repo = hub.add(NAME, tiny)
    fetch = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:]))"
    weights = [sys.executable, "-c", fetch, NAME, "*.safetensors", "config.json", "*index.json", "tokenizer.json"]
    snapshot = subprocess.run(weights, check=True, capture_output=True, text=True).stdout.strip()
    repo.commit({"config.json": b"{}"})
    count = len(hub.paths("GET"))
    path, _ = resolve()  # at the commit that is there, with the small files that were left out
    assert str(path) == snapshot
    assert (path / "tokenizer_config.json").is_file()
    assert not any("safetensors" in p and "index" not in p for p in hub.paths("GET")[count:])
    everything = [sys.executable, "-c", fetch.replace("allow_patterns=sys.argv[2:]", "local_files_only=True"), NAME]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert subprocess.run(everything, check=True, capture_output=True, text=True).stdout.strip() == snapshot


def test_what_other_tools_have_left_is_enough_without_a_hub(hub, tiny, monkeypatch):
    hub.add(NAME, tiny)
    path, _ = resolve()
    cache.pin_file(HubName(NAME)).unlink()
    hub.status = 503
    again, progress = resolve()
    assert again == path
    assert f"Using commit {path.name[:12]}, which another tool has downloaded" in progress[-1]
    assert resolve() == (path, [])


def test_what_cannot_be_served_is_refused_before_its_weights_come(hub, tmp_path):
    model = make_tiny_llama(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    hub.add(NAME, model)
    with pytest.raises(ModelError, match=rf"^{NAME}: config.json: .*MambaForCausalLM"):
        resolve()
    assert not any(path.startswith("cdn:") for path in hub.paths())


def test_a_repository_with_only_a_sentencepiece_model(hub, tmp_path):
    path = make_tiny_llama(tmp_path / "m", vocab=400, tokenizer=False)
    hub.add("o/none", path)
    with pytest.raises(ModelError, match=r"o/none has neither tokenizer\.json nor tokenizer\.model"):
        resolve("o/none")
    train(path)
    hub.add(NAME, path)
    found, progress = resolve()
    assert Tokenizer(found).encode("the fox", False)
    assert open_model(found, store.default_name(NAME)).name == NAME
    assert "to tokenizer.json" in progress[-1]
    assert resolve() == (found, [])


def test_dummy_weights_need_no_weights(hub, tiny):
    hub.add(NAME, tiny)
    path, _ = resolve(load_format="dummy")
    assert open_model(path, NAME, "dummy").num_layers == 2
    assert not any(p.startswith("cdn:") for p in hub.paths())
    assert cache.find(HubName(NAME)) is None


def test_room_on_the_disk_is_checked_before(hub, tmp_path):
    files = {f.name: f.read_bytes() for f in make_tiny_llama(tmp_path / "m").iterdir()}
    hub.add(NAME, files)
    script = (
        "import shutil, sys, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 20)\n"
        "import runpy; runpy.run_module('daemon.models.hub.download', run_name='__main__')"
    )
    arguments = json.dumps({"name": HubName(NAME), "weights": True})
    done = subprocess.run([sys.executable, "-c", script, arguments], capture_output=True, text=True, check=False)
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error.startswith(f"{NAME} needs ") and "which has 0.00 GB free" in error and "HF_HOME" in error


def test_a_cache_that_cannot_be_written_to(hub, tiny, tmp_path, monkeypatch):
    hub.add(NAME, tiny)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot write to the cache .*HF_HOME"):
        resolve()


def test_a_gguf_file_of_a_repository(hub, tmp_path):
    make_tiny_gguf(tmp_path / "g.gguf")
    content = (tmp_path / "g.gguf").read_bytes()
    hub.add(NAME, {"tiny-Q4_0.gguf": content, "tiny-Q8_0.gguf": content + b"\0", "README.md": b""})
    with pytest.raises(ModelError, match=rf"GGUF files only; name one of them: {NAME}:tiny-Q4_0.gguf \(0\.00 GB\), "):
        resolve()
    path, progress = resolve(f"{NAME}:q4_0")
    assert open_model(path).name == "tiny-Q4_0"
    assert progress[0].startswith("downloading") and progress[1].startswith("converting")
    hub.status = 503
    assert resolve(f"{NAME}:q4_0") == (path, [])
    assert {p for p in hub.paths("GET") if p.startswith("cdn:")} == {
        f"cdn:/repos/{NAME}/{hub.repos[NAME].branches['main']}/tiny-Q4_0.gguf"
    }


def test_two_starts_download_once(hub, tiny):
    hub.add(NAME, tiny)
    command = [
        sys.executable,
        "-c",
        PULL.replace("store.pull(sys.argv[1]", "store.resolve(sys.argv[1], 'auto'"),
        NAME,
    ]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    for process in both:
        process.stdout.close()
    assert len([p for p in hub.paths("GET") if p.startswith("cdn:")]) == 2
