"""The demo model through the whole daemon: its answers equal those of Transformers, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
import transformers

from daemon.models import store
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon
from tests.e2e.load_client import Clients

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at 100 degrees Celsius. " * 12 + "Water freezes at",
]
NEW = 24  # tokens


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--devices", "cpu,cpu", "--deterministic", "--kv-memory", "256MiB", engine="model")


@pytest.fixture(scope="module")
def sdk(daemon: Daemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0)


def test_chat_answers_paris_streamed_and_not(sdk: openai.OpenAI) -> None:
    model = sdk.models.list().data[0].id
    whole = sdk.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=32)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = sdk.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=32, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_chat_with_the_asynchronous_client(daemon: Daemon) -> None:
    async def chat() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id
            fields: Any = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
            whole = await client.chat.completions.create(**fields)
            stream = await client.chat.completions.create(**fields, stream=True)
            deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content or "", "".join(deltas)

    whole, streamed = asyncio.run(chat())
    assert whole == streamed
    assert "Paris" in whole


def test_seed_gives_the_same_answer_alone_and_in_a_batch(daemon: Daemon) -> None:
    body: dict[str, Any] = {"prompt": "My favourite animal is", "max_tokens": NEW, "temperature": 1, "seed": 5}
    alone = daemon.post(body).json()["choices"][0]["text"]
    others = [body | {"prompt": PROMPTS[i % 4] + "x" * i, "seed": i, "stream": True} for i in range(7)]
    with Clients(daemon, [*others, body | {"stream": True}]) as clients:
        outcomes = clients.join()
    assert all(outcome.ok for outcome in outcomes)
    assert outcomes[-1].text == alone
    assert daemon.post(body | {"seed": 6}).json()["choices"][0]["text"] != alone


@pytest.fixture
def transformer() -> Iterator[tuple[Any, Any]]:
    """(tokenizer, model in fp32) of Transformers, on one thread: its idle threads would take CPU from the daemon."""
    path = store.resolve("demo", "auto", print)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    yield transformers.AutoTokenizer.from_pretrained(path), model
    torch.set_num_threads(threads)


def reference(tokenizer: Any, model: Any, prompt: str) -> tuple[str, list[float]]:
    """Return the greedy text and its logprobs."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(
            ids,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
    new = out.sequences[0, ids.shape[1] :]
    logprobs = [torch.log_softmax(step[0], -1)[token].item() for step, token in zip(out.logits, new, strict=True)]
    return tokenizer.decode(new), logprobs


def test_greedy_answers_equal_those_of_transformers(daemon: Daemon, transformer: tuple[Any, Any]) -> None:
    bodies = [{"prompt": p, "max_tokens": NEW, "temperature": 0, "logprobs": 0} for p in PROMPTS]
    with Clients(daemon, bodies) as clients:
        outcomes = clients.join()
    for prompt, outcome in zip(PROMPTS, outcomes, strict=True):
        choice = outcome.body["choices"][0]
        text, logprobs = reference(*transformer, prompt)
        assert choice["text"] == text
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-3)


def test_repeated_prompt_is_served_from_the_prefix_cache(daemon: Daemon) -> None:
    prompt = "A lighthouse keeper writes in his diary. " * 10
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    answers = [daemon.post(body).json() for _ in range(4)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    tokens = answers[0]["usage"]["prompt_tokens"]
    assert cached[0] == 0
    # Two engines take turns, so the third request at the latest reaches an engine that has the prompt in its cache.
    assert max(cached[1:3]) == (tokens - 1) // 16 * 16
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
