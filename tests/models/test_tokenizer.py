"""The tokenizer: equal to the `tokenizers` library, and independent of how a stream is divided."""

import json
import threading
import time
from itertools import chain, pairwise

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.models.gguf.tokenizer import write_tokenizer
from daemon.models.model_config import ModelError
from daemon.models.tokenizer import Tokenizer
from tests.models.tiny_model import demo_model_dir, make_tiny_llama

BYTES = 3  # id of <0x00> in the sentencepiece vocabulary
PIECES = ["▁", "a", "b", "c", "é", "ab", "▁a", "▁ab", "bc", "abc", "▁abc", "aa", "▁▁", "🙂", "<tool>"]


def sentencepiece_metadata(**more):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 1), 4]
    prefix = "tokenizer.ggml."
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
    }
    return {prefix + k: v for k, v in (values | more).items()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    tiny = make_tiny_llama(tmp_path_factory.mktemp("tiny"), weights=False)
    pieces = tmp_path_factory.mktemp("pieces")
    (pieces / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    write_tokenizer(sentencepiece_metadata(), pieces)
    # Added tokens outside the vocabulary: a special one, and two whose text is their string.
    library = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    library.add_special_tokens([tokenizers.AddedToken("<|pad ding|>")])
    library.add_tokens([tokenizers.AddedToken("<tool call>"), tokenizers.AddedToken("Ġword")])
    library.save(str(tiny / "tokenizer.json"))
    config = json.loads((tiny / "config.json").read_text()) | {"vocab_size": 400}
    (tiny / "config.json").write_text(json.dumps(config))
    return {"bytes": tiny, "pieces": pieces}


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def pair(request, paths):
    path = paths[request.param]
    return Tokenizer(path), tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def byte_runs_are_valid(ids):
    """Return True if every run of byte tokens of the sentencepiece vocabulary is valid UTF-8."""
    runs: list[list[int]] = [[]]
    for i in ids:
        if BYTES <= i < BYTES + 256:
            runs[-1].append(i - BYTES)
        elif i > 2:
            runs.append([])
    try:
        return all(bytes(run).decode() is not None for run in runs)
    except UnicodeDecodeError:
        return False


def test_decode_equals_the_library(pair):
    ours, library = pair
    ids = st.integers(0, ours.vocab_size + 3)
    text = st.text("ab c🙂é<tool>").map(lambda t: library.encode(t, add_special_tokens=False).ids)
    parts = st.lists(st.one_of(st.just([1]), text)).map(lambda p: list(chain.from_iterable(p)))

    @settings(deadline=None, max_examples=300)
    @given(st.one_of(st.lists(ids, max_size=12), text, parts))
    def check(ids):
        if ours.token_bytes(BYTES) != b"\0" or byte_runs_are_valid(ids):
            assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True)

    check()


def test_only_invalid_bytes_are_replaced(paths):
    pieces = Tokenizer(paths["pieces"])
    e, smile = list("é".encode()), list("🙂".encode())
    ids = [BYTES + b for b in [*e, 0xFF, *smile, 0xF0, 0x9F]]
    assert pieces.decode(ids) == "é\ufffd🙂\ufffd"


def test_a_stream_divided_anywhere_gives_the_same_text(pair):
    ours, _ = pair
    first = ours.encode(" a", add_special=False)[0]
    tokens = st.one_of(st.integers(0, ours.vocab_size + 3), st.sampled_from([0, 1, first]))

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.lists(tokens, max_size=4), max_size=12), st.booleans())
    @example([[1], [first], [first]], False)
    def check(chunks, continuing):
        stream = ours.detokenizer(continuing)
        text = "".join(map(stream.push, chunks)) + stream.finish()
        ids = list(chain.from_iterable(chunks))
        at_once = ours.detokenizer(continuing)
        assert text == at_once.push(ids) + at_once.finish()
        if not continuing:
            assert text == ours.decode(ids)

    check()


def test_text_is_held_back_only_inside_a_character(pair):
    ours, _ = pair

    @settings(deadline=None)
    @given(st.text(max_size=12))
    @example("🙂é")
    def check(text):
        stream = ours.detokenizer(continuing=True)
        sent = b""
        out = ""
        for token in ours.encode(text, add_special=False):
            sent += ours.token_bytes(token)
            out += stream.push([token])
            assert out == sent.decode(errors="ignore")

    check()


def test_encode_equals_the_library_and_decodes_to_the_text(pair):
    ours, library = pair

    @settings(deadline=None)
    @given(st.text(max_size=30), st.booleans())
    def check(text, special):
        ids = ours.encode(text, special)
        assert ids == library.encode(text, add_special_tokens=special).ids
        if not set(text) & {"<", "\u2581"}:  # neither special tokens nor the space of sentencepiece
            assert ours.decode(ids) == text

    check()


def test_sentencepiece_merges_by_score(paths):
    """Compare with the definition: merge the neighbours with the best score, leftmost first."""
    ours = Tokenizer(paths["pieces"])

    @settings(deadline=None, max_examples=300)
    @given(st.text("abc ", min_size=1, max_size=14))
    def check(text):
        symbols = list("▁" + text.replace(" ", "▁"))
        while pairs := [(PIECES.index(a + b), i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        assert ours.encode(text, add_special=True) == [1, *(259 + PIECES.index(s) for s in symbols)]

    check()


def test_the_continuation_of_a_prompt_keeps_its_leading_space(paths):
    pieces = Tokenizer(paths["pieces"])
    ids = pieces.encode("abc", add_special=False)
    assert pieces.decode(ids) == "abc"
    assert pieces.detokenizer(continuing=True).push(ids) == " abc"


def test_special_tokens_can_be_shown(pair):
    ours, library = pair
    ids = [1, *ours.encode("a b", add_special=False), 2, 0]
    stream = ours.detokenizer(skip_special=False)
    text = "".join(stream.push([i]) for i in ids) + stream.finish()
    assert text == library.decode(ids, skip_special_tokens=False)
    assert ours.token_text(2) in text


def test_ids_and_bytes(paths):
    tiny, pieces = Tokenizer(paths["bytes"]), Tokenizer(paths["pieces"])
    assert tiny.eos_ids == pieces.eos_ids == (2,)
    assert {0, 1, 2, 384} == tiny.special_ids
    assert pieces.special_ids == {0, 1, 2}
    assert tiny.vocab_size == 387
    assert (tiny.token_bytes(2), tiny.token_text(2)) == (b"<|im_end|>", "<|im_end|>")
    assert tiny.encode("<|im_end|>", add_special=False) == [2]
    assert pieces.token_bytes(BYTES + 0xE9) == b"\xe9"
    assert pieces.token_text(BYTES + 0xE9) == "\ufffd"
    assert pieces.token_bytes(259 + PIECES.index("▁ab")) == b" ab"
    assert tiny.token_bytes(9999) == tiny.token_bytes(-1) == b""


def test_unpaired_surrogates_are_replaced(pair):
    ours, _ = pair
    assert ours.decode(ours.encode("a\ud800b\ud83d\ude42", add_special=False)) == "a\ufffdb🙂"


def test_truncation_and_padding_in_the_file_are_ignored(paths, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(paths["bytes"] / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    assert len(ours.encode("abcdefgh" * 4, add_special=True)) > 4
    assert len(ours.encode("a", add_special=True)) == 1


def test_unsupported_tokenizers_are_refused(paths, tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be used"):
        Tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(paths["bytes"] / "tokenizer.json"))
    library.decoder = tokenizers.decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer(tmp_path)
    small = make_tiny_llama(tmp_path / "small", weights=False)
    (small / "config.json").write_text('{"vocab_size": 300}')
    with pytest.raises(ModelError, match="only 300"):
        Tokenizer(small)


def test_the_demo_model_equals_transformers():
    from transformers import AutoTokenizer

    path = demo_model_dir()
    ours, reference = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert ours.vocab_size == len(reference) == 49152
    assert ours.eos_ids == (reference.eos_token_id,) == (2,)
    assert ours.special_ids == set(reference.all_special_ids) | set(range(17))

    @settings(deadline=None, max_examples=200)
    @given(st.text(max_size=40), st.lists(st.integers(0, 49151), max_size=20))
    @example("in 2024 I'd pay 1234 dollars, naïve 你好 🙂🙂\n\n\tx  y<|im_end|>", [1, 2, 3, 215, 216])
    def check(text, ids):
        assert ours.encode(text, add_special=True) == reference(text).input_ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)

    check()


def longest_wait(work) -> float:
    """Return the longest time in seconds that another thread does not run while this one does `work`."""
    longest, stop = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not stop.wait(0.001):
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    work()
    stop.set()
    thread.join()
    return longest


def test_other_threads_run_while_a_text_is_tokenised(paths):
    tokenizer = Tokenizer(paths["bytes"])
    text = "the quick brown fox jumps over the lazy dog. " * 20_000
    start = time.perf_counter()
    waited = longest_wait(lambda: tokenizer.count(text))
    assert waited < (time.perf_counter() - start) / 2


def test_a_token_stands_for_at_most_so_many_characters(pair):
    ours, _ = pair
    assert ours.max_token_chars > 0
    for text in ("  " * 500, "the quick" * 100, "🙂é" * 100, "<|pad ding|>" * 50, "e\u0301\u0323" * 100):
        assert len(text) <= ours.max_token_chars * ours.count(text)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)
def test_there_is_no_bound_on_characters_if_the_tokenizer_removes_some(paths, tmp_path, change):
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_text((paths["bytes"] / file).read_text())
    state = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer(tmp_path).max_token_chars == 0
