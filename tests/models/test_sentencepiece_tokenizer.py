"""A tokenizer.model becomes a tokenizer.json that splits every text as sentencepiece does."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.models import store
from daemon.models.files import ModelError
from daemon.models.loader import open_model
from daemon.models.sentencepiece_tokenizer import convert_tokenizer
from daemon.models.text_files import load_text_files
from daemon.models.tokenizer import Tokenizer
from tests.models.tiny_model import _CORPUS, make_tiny_llama

LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "vocab_size": 380,
    "hard_vocab_limit": False,
    "minloglevel": 2,
}
VARIANTS = {
    "Llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "user-defined": {"user_defined_symbols": ["<|im_end|>", "[INST]"], "control_symbols": ["<pad>"]},
    "no bytes": {"byte_fallback": False, "character_coverage": 1.0},
}
words = st.lists(
    st.one_of(
        st.sampled_from([w + s for text in _CORPUS for w in text.split() for s in (" ", "")]), st.text(max_size=8)
    )
)


def train(path, **options):
    """Write a tokenizer.model that was trained as that of Llama, and return its processor."""
    path.mkdir(exist_ok=True)
    with (path / "tokenizer.model").open("wb") as f:
        corpus = iter([line for text in _CORPUS for line in text.splitlines()] * 20)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus, model_writer=f, **LLAMA | options)
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


def convert(path, config=None):
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    convert_tokenizer(path, path)
    return Tokenizer(path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("legacy", [True, False])
def test_texts_are_split_as_by_sentencepiece(tmp_path, variant, legacy):
    processor = train(tmp_path, **VARIANTS[variant])
    tokenizer = convert(tmp_path, {"legacy": legacy})
    special = {processor.id_to_piece(i) for i in range(len(processor)) if not processor.is_byte(i)}
    special = {p for p in special if p.startswith("<") or p == "[INST]"}

    @settings(max_examples=80, deadline=None)
    @given(words)
    def check(parts):
        text = "".join(parts).replace("\0", "")
        if not any(piece in text for piece in special) and "▁" not in text and (legacy or not text.startswith(" ")):
            ids = tokenizer.encode(text, False)
            assert ids == processor.encode(text), text
            if variant != "no bytes":
                assert tokenizer.decode(ids) == text

    check()


def test_added_tokens_and_the_ends_of_a_text(tmp_path):
    size = len(train(tmp_path, user_defined_symbols=["[INST]"]))
    added = {str(size): {"content": "<|im_start|>", "special": True}, "1": {"content": "<s>", "special": True}}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1}))
    tokenizer = convert(tmp_path, {"added_tokens_decoder": added, "add_eos_token": True})
    ids = tokenizer.encode("<|im_start|>[INST]the<|im_end|>", True)
    assert ids[:2] == [1, size] and ids[-2:] == [size + 1, 2]
    assert {size, size + 1, 1} <= tokenizer.special_ids
    with pytest.raises(ModelError, match=rf"'<extra>' cannot have the id {size + 9}"):
        convert(tmp_path, {"added_tokens_decoder": added | {str(size + 9): {"content": "<extra>"}}})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, "model_type is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"changes texts first \(normalizer nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ],
)
def test_what_cannot_be_converted_says_why(tmp_path, options, reason):
    train(tmp_path, **options)
    with pytest.raises(ModelError, match=reason):
        convert(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"tokenizer\.model is not a sentencepiece model"):
        convert(tmp_path)


def test_the_store_converts_once_and_links_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("LLUMD_CACHE", str(tmp_path / "cache"))
    path = make_tiny_llama(tmp_path / "Tiny", vocab=400, eos=2, tokenizer=False)
    processor = train(path)
    progress: list[str] = []
    found = store.resolve(str(path), "auto", progress.append)
    assert found.name == "Tiny" and found != path
    assert progress == [f"converting {path}/tokenizer.model to tokenizer.json, stored in {found.parent}"]
    assert open_model(found).eos_token_ids == (2,)
    assert load_text_files(found).tokenizer.encode("the fox", False) == processor.encode("the fox")
    assert (found / "model.safetensors").is_symlink()
    assert store.resolve(str(path), "auto", progress.append) == found and len(progress) == 1


@pytest.mark.integration
def test_the_result_is_that_of_transformers(tmp_path):
    from transformers import LlamaTokenizer

    train(tmp_path)
    theirs = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True, legacy=False)
    ours = convert(tmp_path, {"legacy": False})
    for text in [*_CORPUS, " a leading space", "<s>after a token", ""]:
        assert ours.encode(text, True) == theirs(text)["input_ids"]
