"""Grammars compiled in the process of their own: hostile ones end there, and the others are not held up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from daemon.api.errors import ApiError
from daemon.api.grammar.compiler import GrammarCompiler
from daemon.config import Config
from daemon.models.grammar.source import GrammarKind, GrammarSource
from daemon.models.model_config import ModelConfig, read_model_config
from tests.models.tiny_model import make_tiny_llama

GOOD = GrammarSource(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
CHAIN = "start: r0\n" + "".join(f'r{i}: r{i + 1} | "x"\n' for i in range(4000)) + 'r4000: "z"\n'
HOSTILE = {
    "huge automaton": GrammarSource(GrammarKind.JSON_SCHEMA, '{"type": "integer", "multipleOf": 9999991}'),
    "long chain of rules": GrammarSource(GrammarKind.GRAMMAR, CHAIN),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path: Path = make_tiny_llama(tmp_path_factory.mktemp("model"), weights=False, vocab=384)
    return read_model_config(path)


def run(model: ModelConfig, body: Callable[[GrammarCompiler], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        compiler = GrammarCompiler(Config(**options), model)
        try:
            await body(compiler)
        finally:
            compiler.close()

    uvloop.run(main())


async def refused(compiler: GrammarCompiler, source: GrammarSource) -> str:
    with pytest.raises(ApiError) as raised:
        await compiler.compile(source, "guided_json")
    assert (raised.value.status, raised.value.param) == (400, "guided_json")
    return raised.value.message


def test_a_hostile_grammar_is_refused_and_holds_up_no_other(model):
    async def body(compiler: GrammarCompiler) -> None:
        tasks = {name: asyncio.create_task(refused(compiler, source)) for name, source in HOSTILE.items()}
        await asyncio.sleep(0)
        good, _ = await asyncio.gather(compiler.compile(GOOD, "p"), compiler.compile(GOOD, "p"))
        assert "json_schema" in good
        assert "takes more than" in await tasks["huge automaton"]
        assert "nested too deeply" in await tasks["long chain of rules"]
        assert not tasks["huge automaton"].cancelled()
        assert await compiler.compile(GOOD, "p") == good

    run(model, body, grammar_timeout=0.5)


def test_a_bad_grammar_is_refused_with_its_reason(model):
    async def body(compiler: GrammarCompiler) -> None:
        for _ in range(2):  # the second answer is known
            message = await refused(compiler, GrammarSource(GrammarKind.REGEX, "a(?=b)"))
            assert "look-ahead" in message and message.startswith("`guided_json` cannot be used")
        long = await refused(compiler, GrammarSource(GrammarKind.REGEX, "a" * 2000))
        assert "2000 bytes" in long and "1024" in long

    run(model, body, max_grammar=1024)


def test_the_process_is_started_again_after_its_death(model):
    async def body(compiler: GrammarCompiler) -> None:
        await compiler.compile(GOOD, "p")
        assert compiler._process is not None
        os.kill(compiler._process._process.pid, signal.SIGKILL)
        while not compiler._process.closed:
            await asyncio.sleep(0.01)
        assert await compiler.compile(GrammarSource(GrammarKind.REGEX, "a+"), "p")

    run(model, body)


def test_a_model_without_an_end_token_is_refused(model):
    async def body(compiler: GrammarCompiler) -> None:
        assert "end-of-sequence" in await refused(compiler, GOOD)

    run(replace(model, eos_token_ids=()), body)
