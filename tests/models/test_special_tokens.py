"""Special tokens: what ends an answer, and what chat templates know by name, from all files that name them."""

import json

import pytest
import tokenizers

from daemon.cli.prepare import prepare
from daemon.config import Config
from daemon.models.model_config import read_model_config
from daemon.models.special_tokens import special_tokens
from daemon.models.tokenizer import Tokenizer
from tests.models.tiny_model import make_tiny_llama


def edit(path, name, **changes):
    file = path / name
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | changes))


def model_with(path, *added, special=True, **names):
    """Return a tiny model whose files name no end token, with more added tokens; their ids are from 384 up."""
    path = make_tiny_llama(path, weights=False)
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    state = json.loads(library.to_str())
    for token in state["added_tokens"]:
        token["content"] = old = f"<{token['id']}>"
        state["model"]["vocab"] = {old if i == token["id"] else t: i for t, i in state["model"]["vocab"].items()}
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    library.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added])
    library.save(str(path / "tokenizer.json"))
    edit(path, "config.json", eos_token_id=None, bos_token_id=None, vocab_size=400)
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def ends(path):
    ids = read_model_config(path).eos_token_ids
    tokenizer = Tokenizer(path)
    assert tokenizer.eos_ids == ids
    return {tokenizer.token_text(i) for i in ids}


@pytest.mark.parametrize("named", ["<|stop|>", {"content": "<|stop|>", "lstrip": False}])
def test_the_tokenizers_eos_is_an_end_besides_the_configured_one(tmp_path, named):
    path = model_with(tmp_path, "<|stop|>", eos_token=named)
    edit(path, "config.json", eos_token_id=1)
    assert ends(path) == {"<1>", "<|stop|>"}
    assert read_model_config(path).eos_token_ids[0] == 1


@pytest.mark.parametrize("name", ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"])
@pytest.mark.parametrize("special", [True, False])
def test_known_names_of_ends_of_turns_are_ends(tmp_path, name, special):
    assert ends(model_with(tmp_path, name, "<|other|>", special=special)) == {name}


def test_a_known_name_that_is_no_single_token_is_no_end(tmp_path):
    assert ends(model_with(tmp_path)) == set()


def test_the_end_of_a_document_is_an_end_where_no_other_is_known(tmp_path):
    assert ends(model_with(tmp_path / "a", "<|endoftext|>")) == {"<|endoftext|>"}
    assert ends(model_with(tmp_path / "b", "<|endoftext|>", "<|im_end|>")) == {"<|im_end|>"}
    assert ends(model_with(tmp_path / "c", "<|endoftext|>", bos_token="<|endoftext|>")) == set()


def test_in_harmony_the_end_of_a_message_is_not_the_end_of_an_answer(tmp_path):
    assert ends(model_with(tmp_path, "<|end|>", "<|return|>", "<|call|>")) == {"<|return|>", "<|call|>"}


def test_an_added_token_without_an_embedding_is_no_end(tmp_path):
    path = model_with(tmp_path, "<|im_end|>")
    edit(path, "config.json", vocab_size=384)
    assert read_model_config(path).eos_token_ids == ()


def test_names_come_from_every_file(tmp_path):
    path = model_with(tmp_path, "<|a|>", "<|b|>", bos_token="<|a|>")
    edit(path, "special_tokens_map.json", eos_token={"content": "<|b|>"}, bos_token="<|b|>")
    edit(path, "config.json", pad_token_id=0, unk_token_id=-1)
    # As in Transformers, the older file goes first, unless the newer one is complete.
    assert special_tokens(path) == {"bos_token": "<|b|>", "eos_token": "<|b|>", "pad_token": "<0>"}
    edit(path, "tokenizer_config.json", added_tokens_decoder={})
    assert special_tokens(path) == {"bos_token": "<|a|>", "eos_token": "<|b|>", "pad_token": "<0>"}
    assert ends(path) == {"<|b|>"}


def test_a_model_without_an_end_is_warned_of(tmp_path):
    path = make_tiny_llama(tmp_path)
    said = []
    prepare(Config(model=str(path), devices=["cpu"]), said.append)
    assert not said
    edit(path, "config.json", eos_token_id=None)
    (path / "tokenizer_config.json").write_text("{}")
    text = (path / "tokenizer.json").read_text().replace("<|im_end|>", "<|stop|>")
    (path / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|begin|>"))
    prepare(Config(model=str(path), devices=["cpu"]), said.append)
    assert ["warning" in line and "no known end token" in line for line in said] == [True]
