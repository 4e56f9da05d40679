"""Work in the text threads: what a cancelled call leaves behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from functools import partial

import pytest

from daemon.api.metrics import DaemonSnapshot, FrontendMetrics
from daemon.api.origins import OriginPolicy
from daemon.api.service import Service
from daemon.config import Config
from daemon.ipc.metrics_page import FRONTEND, MetricsPage
from tests.api.harness import Model, ScriptedGenerator


class Body(bytearray):
    """A body that a weak reference can watch."""


@pytest.fixture
def service(model: Model):
    page = MetricsPage(memoryview(bytearray(FRONTEND.nbytes)), FRONTEND)
    made = Service(
        config=Config(),
        generator=ScriptedGenerator(reply=lambda prompt, params: []),
        tokenizer=model.tokenizer,
        chat_template=model.chat,
        model_config=model.model_config,
        metrics=FrontendMetrics(page, lambda: DaemonSnapshot([], [], [])),
        origins=OriginPolicy(Config(), keys=False),
        guard=None,
    )
    yield made
    made.close()


@pytest.mark.parametrize("size", [100_000, 1 << 20])
def test_cancelled_calls_free_their_bodies_before_their_turn_comes(service, size, caplog):
    caplog.set_level(logging.DEBUG)
    watched, parsed, free = [], [], threading.Event()

    async def parse() -> int:
        body = Body(b"x" * size)
        watched.append(weakref.ref(body))
        return await service.off_loop(partial(_parse, parsed, body), size)

    async def run() -> None:
        busy = asyncio.create_task(service.off_loop(partial(free.wait, 30), size))
        try:
            calls = [asyncio.create_task(parse()) for _ in range(50)]
            await asyncio.sleep(0)
            assert all(one() is not None for one in watched) and len(watched) == 50
            for call in calls:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(result) for result in results} == {asyncio.CancelledError}
            del results, calls, call
            await asyncio.sleep(0)  # this step of the task still holds the errors, with their frames
            gc.collect()
            assert not any(one() is not None for one in watched)
            assert not busy.done()
        finally:
            free.set()
        assert await busy
        assert await parse() == size  # the thread is well

    asyncio.run(run())
    assert parsed == [size]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def _parse(parsed: list[int], body: Body) -> int:
    parsed.append(len(body))
    return len(body)
