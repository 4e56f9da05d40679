"""Names of models on the hub, and which files of a repository they mean."""

import pytest

from daemon.models.files import ModelError
from daemon.models.hub.cache import hub_cache
from daemon.models.hub.files import RemoteFile, gguf_file, small_files, weight_files
from daemon.models.hub.name import HubName, parse_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("o/m@v1.1", HubName("o/m", "v1.1")),
        ("o/m@refs/pr/3", HubName("o/m", "refs/pr/3")),
        ("o/m:Q8_0", HubName("o/m", "main", "Q8_0")),
        ("o/m@dev:sub/m-Q8_0.gguf", HubName("o/m", "dev", "sub/m-Q8_0.gguf")),
    ],
)
def test_a_name_is_read_and_written(text, name):
    assert parse_name(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    ["m", "", "/a/b", "a/b/c", "a/b.gguf", "../a", "a/..", "o/m@../x", "o/m:/x", "o/m@", "a b/c", "o/m--x", "é/m"],
)
def test_what_is_no_name(text):
    assert parse_name(text) is None


def test_a_gguf_file_is_named_by_its_quantisation():
    files = [
        "m-Q4_K.gguf",
        "m-Q4_K_M.gguf",
        "sub/m.Q8_0.gguf",
        "m-F16-00001-of-00002.gguf",
        "m-F16-00002-of-00002.gguf",
    ]
    assert gguf_file("o/m", files, "q4_k") == "m-Q4_K.gguf"
    assert gguf_file("o/m", files, "Q4_K_M") == "m-Q4_K_M.gguf"
    assert gguf_file("o/m", files, "Q8_0") == "sub/m.Q8_0.gguf"
    for wanted, reason in (
        ("F16", "split into 2 files"),
        ("Q2_K", r"no file Q2_K; there are o/m:m-F16"),
        ("M", "no file"),
    ):
        with pytest.raises(ModelError, match=reason):
            gguf_file("o/m", files, wanted)
    with pytest.raises(ModelError, match="several files Q8_0"):
        gguf_file("o/m", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0")


def test_neither_code_nor_pickles_nor_a_second_format_are_needed():
    names = [
        "config.json",
        "modeling.py",
        "tokenizer.json",
        "tokenizer.model",
        "model.safetensors",
        "a.bin",
        "original/x.pth",
    ]
    names += [
        "consolidated.safetensors",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "README.md",
    ]
    listing = dict.fromkeys(names, RemoteFile(1, "", False))
    assert small_files(listing) == [
        "config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "additional_chat_templates/tool_use.jinja",
    ]
    assert weight_files("o/m", listing, None) == ["model.safetensors"]
    with pytest.raises(ModelError, match=r"o/m lacks the shard b\.safetensors that its model"):
        weight_files("o/m", listing, {"weight_map": {"x": "model.safetensors", "y": "b.safetensors"}})
    pickles = {"pytorch_model.bin": RemoteFile(1, "", False)}
    with pytest.raises(ModelError, match=r"only as pickles \(pytorch_model\.bin\)"):
        weight_files("o/m", pickles, None)


def test_the_cache_is_that_of_other_tools(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    assert str(hub_cache({})) == "/home/u/.cache/huggingface/hub"
    assert str(hub_cache({"XDG_CACHE_HOME": "/x"})) == "/x/huggingface/hub"
    assert str(hub_cache({"XDG_CACHE_HOME": "/x", "CACHE_DIRECTORY": "/var/cache/llumd"})) == (
        "/var/cache/llumd/huggingface/hub"
    )
    assert str(hub_cache({"CACHE_DIRECTORY": "/var/cache/llumd", "HF_HOME": "~/hf"})) == "/home/u/hf/hub"
    assert str(hub_cache({"HF_HOME": "/hf", "HF_HUB_CACHE": "/cache"})) == "/cache"
