"""The script runner: it says what is written, whatever happens to the request in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon.config import ConfigError
from daemon.engine.fake.script import UNWRITTEN, Script, ScriptRunner, read_script
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.models.tokenizer import Tokenizer
from tests.models.tiny_model import make_tiny_llama

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tiny_llama(tmp_path_factory.mktemp("m"), weights=False))


def script(path: Path, *entries: dict[str, str]) -> Script:
    (path / "script.json").write_text(json.dumps(entries))
    return read_script(path / "script.json")


def runner(script: Script, tokenizer: Tokenizer) -> ScriptRunner:
    return ScriptRunner(script, tokenizer, (EOS,), step_seconds=0, vocab_size=4096, max_model_len=500)


def request(tokens: list[int], prompt_len: int) -> Request:
    return Request(1, 1, 0, RequestParams(SamplingParams(max_tokens=99, seed=0), 0.0), tokens, prompt_len)


def said(run: ScriptRunner, prompt: list[int]) -> list[int]:
    """Return the output up to the first end token."""
    found = request(list(prompt), len(prompt))
    start = 0
    while found.tokens[-1] != EOS or not found.num_output:
        count = len(found.tokens) - start
        start = len(found.tokens)
        found.tokens += run.execute(StepPlan([Row(found, start - count, count, True)], 0)).tokens
    return found.tokens[len(prompt) :]


def test_the_first_entry_in_the_prompt_is_the_answer(tmp_path: Path, tokenizer: Tokenizer):
    found = script(
        tmp_path, {"when": "sunny\\Z", "say": "It is."}, {"when": "weath.r.*Rome", "say": "call()"}, {"say": "Hello"}
    )
    assert found.answer("weather in\nRome") == "call()"
    assert found.answer("weather in Rome: sunny") == "It is."
    assert found.answer("") == "Hello"
    run = runner(found, tokenizer)
    for prompt, text in (("weather in Rome: sunny", "It is."), ("other", "Hello")):
        output = said(run, tokenizer.encode(prompt, False))
        assert output[-1] == EOS and tokenizer.decode(output[:-1]) == text


def test_a_prompt_that_no_entry_fits_gets_an_answer_that_says_so(tmp_path: Path):
    assert script(tmp_path, {"when": "x", "say": "y"}).answer("z") == UNWRITTEN


def test_a_resumed_request_goes_on_at_any_position(tmp_path: Path, tokenizer: Tokenizer):
    found = script(tmp_path, {"say": "A somewhat longer answer, to be cut."})
    prompt = tokenizer.encode("prompt", False)
    output = said(runner(found, tokenizer), prompt)
    assert len(output) > 3
    for done, token in enumerate(output):
        tokens = prompt + output[:done]
        moved = request(tokens, len(prompt))  # to another engine, without its KV
        row = Row(moved, 0, len(tokens), True)
        assert runner(found, tokenizer).execute(StepPlan([row], 0)).tokens == [token]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be JSON of the form"),
        ('{"say": "x"}', "must be JSON of the form"),
        ('[{"when": "x"}]', "missing required field `say`"),
        ('[{"says": "x"}]', "must be JSON of the form"),
        ('[{"when": "(", "say": "x"}]', "not a regular expression"),
        (b"\xff", "must be JSON"),
    ],
)
def test_a_file_that_is_no_script_is_refused(tmp_path: Path, text: str | bytes, why: str):
    file = tmp_path / "s.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=why):
        read_script(file)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"script: cannot read .*none.json"):
        read_script(tmp_path / "none.json")


def test_equal_files_have_equal_digests(tmp_path: Path):
    one = script(tmp_path, {"say": "x"}).digest
    assert script(tmp_path, {"say": "x"}).digest == one != script(tmp_path, {"say": "y"}).digest
