"""Requests with a grammar in a real daemon: exact while they move and while processes die, whatever others send."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import validate

from daemon.api.params import choice_seed
from daemon.engine.fake.hash import expected_stream
from daemon.engine.fake.masked import token_ids
from daemon.models import store
from daemon.models.grammar.source import GrammarKind, GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.model_config import read_model_config
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.hash_engine import prompt_of, tokenizer, tokens_of, vocab_size
from tests.e2e.load_client import Clients, Outcome
from tests.e2e.mover import TAKEOVERS, RandomMover

CHAT = "/v1/chat/completions"
REGEXES = ("([a-d]{3}-){40}", "[0-9a-f]{200}", "((yes|no) ){50}end")
HOSTILE: list[dict[str, Any]] = [
    {"guided_json": {"type": "integer", "multipleOf": 9999991}},
    {"guided_grammar": "start: r0\n" + "".join(f'r{i}: r{i + 1} | "x"\n' for i in range(4000)) + 'r4000: "z"\n'},
    {"guided_regex": "(a|aa)+(?=b)"},
]
TOO_COMPLEX = {"guided_regex": "(.*a.{200}b)"}  # its automaton has more states than a grammar may have


@pytest.fixture(scope="module")
def duo(start_shared: Start) -> Daemon:
    return start_shared("--stub-step", "10ms", "--no-rebalance", "--grammar-timeout", "0.5", engine="hash")


@pytest.fixture
def daemon(duo: Daemon) -> Daemon:
    return duo.await_serving()


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(tokenizer(), vocab_size(), end_tokens())


@cache
def end_tokens() -> tuple[int, ...]:
    return read_model_config(store.resolve("demo", "dummy", print), "").eos_token_ids


def request(i: int, *, stream: bool = True) -> dict[str, Any]:
    fields = {"prompt": prompt_of(i, 40), "max_tokens": 300, "seed": i, "logprobs": 0, "stream": stream}
    return fields | {"guided_regex": REGEXES[i % len(REGEXES)]}


@cache
def _expected(i: int) -> list[str]:
    body, end = request(i), end_tokens()[0]
    source = GrammarSource(GrammarKind.REGEX, body["guided_regex"])
    matcher = vocabulary().compile(to_llguidance(source))
    followed: list[int] = []

    def allowed(output: Sequence[int]) -> Sequence[int]:
        if end in output:
            return [end]
        assert matcher.consume_tokens(list(output[len(followed) :]))
        followed[:] = output
        return token_ids(np.frombuffer(matcher.compute_bitmask(), np.int32)).tolist()

    stream = expected_stream(body["prompt"], choice_seed(i, 0), body["max_tokens"], vocab_size(), allowed)
    return [tokenizer().token_text(token) for token in stream[: stream.index(end) + 1]]


def exact(body: dict[str, Any], outcome: Outcome) -> bool:
    """Return True if the answer is complete and every token is the only correct one."""
    finish = outcome.finish or outcome.body["choices"][0]["finish_reason"]
    return outcome.ok and finish == "stop" and tokens_of(outcome) == _expected(body["seed"])


def test_requests_that_move_match_exactly(daemon: Daemon) -> None:
    before = daemon.metric(TAKEOVERS)
    sent = [request(i, stream=i % 3 != 0) for i in range(24)]
    for seed in count(1):
        with Clients(daemon, sent) as clients, RandomMover(daemon, seed, engines=2):
            outcomes = clients.join()
        assert all(map(exact, sent, outcomes))
        if daemon.metric(TAKEOVERS) - before > 10:
            break


@pytest.mark.parametrize("role", ["frontend", "engine"])
def test_requests_outlive_a_process(daemon: Daemon, role: str) -> None:
    sent = [request(i) for i in range(30, 42)]
    with Clients(daemon, sent) as clients:
        clients.await_tokens(10)
        before = daemon.kill(role)
        outcomes = clients.join()
    assert all(map(exact, sent, outcomes))
    daemon.await_successor(role, 0, before)


def test_a_hostile_grammar_costs_only_its_own_request(daemon: Daemon) -> None:
    sent = [request(i) for i in range(50, 58)]
    plain = {"prompt": prompt_of(1, 20), "max_tokens": 150}
    with Clients(daemon, sent) as clients:
        for fields in HOSTILE:
            answer = daemon.post(plain | fields)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == next(iter(fields))
        broken = daemon.post(plain | TOO_COMPLEX)
        outcomes = clients.join()
    assert broken.status_code == 500 and broken.json()["error"]["code"] == "engine_error"
    assert all(map(exact, sent, outcomes))
    wait_for("idle engines", lambda: all(not row["kv_used_blocks"] for row in daemon.status()["engines"]))


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 6},
        "sure": {"type": "boolean"},
    },
    "required": ["city", "days", "sure"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


def chat(i: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"The weather of town {i}, as JSON."}]
    return {"messages": messages, "max_tokens": 100, "seed": i, "temperature": 1, "stream": True} | fields


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_model_answers_in_form_and_calls_tools_while_it_moves(start: Start) -> None:
    """In deterministic mode a moved answer has the same bytes."""
    daemon = start("--deterministic", "--no-rebalance", "--threads", "1", engine="model")
    tools = {"tools": [WEATHER], "tool_choice": "required"}
    sent = [chat(i, **(tools if i % 2 else {"response_format": FORMAT})) for i in range(6)]
    with ThreadPoolExecutor(len(sent)) as pool:
        answers = list(pool.map(partial(_chat, daemon), sent))
        with RandomMover(daemon, 1, engines=2, max_moves=4):
            moved = list(pool.map(partial(_chat, daemon), sent))
    assert moved == answers and daemon.metric(TAKEOVERS) > 0
    stopped = [text for text, finish in answers if finish in ("stop", "tool_calls")]
    assert len(stopped) >= 5
    for text in stopped:
        validate(json.loads(text), SCHEMA)


def _chat(daemon: Daemon, body: dict[str, Any]) -> tuple[str, str]:
    """Return the text of a streamed answer, or the arguments of its calls, and how it has ended."""
    out, finish = [], ""
    with httpx.stream("POST", daemon.url + CHAT, json=body, timeout=120) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            delta = choice["delta"]
            out.append(delta.get("content") or "")
            out += [call["function"].get("arguments") or "" for call in delta.get("tool_calls") or ()]
            finish = choice["finish_reason"] or finish
    return "".join(out), finish
