"""What a frontend loads of a model: everything that it cannot use is found before the start, with a message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from daemon.models import text_files
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError
from daemon.models.text_files import checked, load_text_files
from tests.models.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("good"))


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def cut_in_half(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_another_decoder(model: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    library.decoder = tokenizers.decoders.WordPiece()
    library.save(str(model / "tokenizer.json"))


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def add_token(model: Path, text: str, token: int) -> None:
    file = model / "tokenizer.json"
    state = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    state["added_tokens"].append({"id": token, "content": text} | flags)
    file.write_text(json.dumps(state))


DAMAGE = [
    (cut_in_half, "tokenizer.json cannot be used: EOF"),
    (with_another_decoder, "decoder WordPiece is not supported"),
    (write("tokenizer.json", b"[]"), "tokenizer.json cannot be used"),
    (write("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
    (write("chat_template.jinja", b"{% for m in messages %}{{ m "), "does not compile, line 1"),
    (write("chat_template.jinja", b"{{ messages | no_filter }}"), "does not compile, line 1: No filter named"),
    (write("chat_template.jinja", b"\xe9"), "cannot read .*chat_template.jinja: it is not UTF-8 text"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_what_a_frontend_cannot_use_is_found(model: Path, damage: Callable[[Path], object], message: str):
    damage(model)
    with pytest.raises(ModelError, match=message):
        load_text_files(model)


def test_the_check_in_another_process(model: Path):
    with checked(model):
        pass
    cut_in_half(model)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be used: EOF"), checked(model):
        pass


def test_an_error_of_the_other_checks_wins(model: Path):
    cut_in_half(model)
    with pytest.raises(ZeroDivisionError), checked(model):
        raise ZeroDivisionError


def test_a_check_that_never_ends(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "_TIMEOUT", 0.001)
    with pytest.raises(ModelError, match="took longer than"), checked(model):
        pass


def test_a_library_that_fails_in_its_own_way(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "ChatTemplate", lambda path: 1 / 0)
    with pytest.raises(ModelError, match=r"cannot be loaded \(ZeroDivisionError"):
        load_text_files(model)


def test_an_added_token_beyond_the_embeddings_is_served(model: Path):
    """As Transformers does: Llama 2's `[PAD]` has the id `vocab_size`, and no usual text contains it."""
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    add_token(model, "[PAD]", size)
    tokenizer = load_text_files(model).tokenizer
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a[PAD]", add_special=False)[1:] == [size]
    assert tokenizer.decode([size]) == "" and tokenizer.token_text(size) == "[PAD]"


JSON = st.sampled_from([None, True, -1, 0, 2**63, 1.5, "", "x", [], ["x"], {}, {"x": 1}])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_any_value_in_a_file_is_used_or_refused_with_a_message(good: Path, tmp_path_factory, name: str):
    model = Path(shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "model"))
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    original: dict[str, Any] = json.loads((model / name).read_text())
    keys = sorted(original)

    @given(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        (model / name).write_text(json.dumps(original | changes))
        for load in (open_model, load_text_files):
            try:
                load(model)
            except ModelError as e:
                assert "Error" not in str(e) and "invalid literal" not in str(e), e

    check()
