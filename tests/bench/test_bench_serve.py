"""The load generator against a server in this process whose behaviour is known."""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from bench import serve

pytestmark = pytest.mark.integration


class Scripted:
    """Streams max_tokens words; a request whose number is in `faults` fails in that way."""

    def __init__(self, faults=None, *, pause=0.0, usage=True):
        self.hangs_up = False  # after each answer, without having said so
        self.faults, self.pause, self.usage = faults or {}, pause, usage
        self.bodies, self.running, self.most = [], 0, 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append((request.path, body))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.answer(request, body, self.faults.get(number))
        finally:
            self.running -= 1

    async def answer(self, request, body, fault):
        if fault == 429:
            return web.json_response({"error": {"message": "busy"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for i in range(body["max_tokens"]):
            await asyncio.sleep(self.pause)
            if fault == "hang":
                await asyncio.sleep(3600)
            if fault == "cut" and i == 1:
                request.transport.abort()
                return response
            if fault == "error" and i == 1:
                await self.event(response, {"error": {"message": "engine lost"}})
                return response
            await self.event(response, self.chunk(request, f"w{i} ", None))
        await self.event(response, self.chunk(request, "", "length"))
        if self.usage:
            usage = {"prompt_tokens": 11, "completion_tokens": body["max_tokens"]}
            await self.event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        if self.hangs_up:
            await response.write_eof()
            await asyncio.sleep(0.02)
            request.transport.abort()
        return response

    def chunk(self, request, text, finish):
        told = {"delta": {"content": text}} if "chat" in request.path else {"text": text}
        return {"choices": [{"index": 0, "finish_reason": finish, **told}], "usage": None}

    async def event(self, response, data):
        await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    @asynccontextmanager
    async def listening(self):
        app = web.Application()
        app.router.add_post("/v1/{rest:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def bench(argv: str, *servers: Scripted):
    """What `benchmark` found and printed; {0} and {1} in `argv` are the servers' addresses."""

    async def go():
        lines: list[str] = []
        async with servers[0].listening() as url, servers[-1].listening() as other:
            args = serve.parse(["--model", "m", "--url", url, *argv.format(url, other).split()])
            return await serve.benchmark(args, lines.append), "\n".join(lines)

    return asyncio.run(go())


def test_a_closed_loop_keeps_exactly_that_many_in_flight_and_counts_every_token():
    server = Scripted(pause=0.01)
    found, _ = bench("--concurrency 1,5 --requests 15 --output-tokens 6 --warmup 0", server)
    one, five = found["runs"]
    assert server.most == 5
    for r in (one, five):
        assert (r["requests"], r["failed"], r["output_tokens"], r["prompt_tokens"]) == (15, 0, 90, 165)
        assert (r["tokens_from"], r["tokens_per_chunk"], r["finish"]) == ("usage", 1.0, {"length": 15})
        assert 0 < r["ttft"]["p50"] < r["e2e"]["p50"] <= r["e2e"]["p99"] <= r["e2e"]["max"] <= r["seconds"]
        assert 0 < r["tpot"]["p50"] < r["e2e"]["max"]
    assert five["output_tokens_per_second"] > one["output_tokens_per_second"]
    assert len({json.dumps(body["messages"]) for _, body in server.bodies}) == 30


def test_the_request_says_what_was_asked_for():
    server = Scripted()
    bench(
        "--endpoint completions --prompt-tokens 9 --token-ids 5 7 --output-tokens 3 --ignore-eos --logprobs "
        '--continuous-usage --temperature 0.5 --extra-body {{"top_k":4}} --requests 1 --concurrency 1 --warmup 0',
        server,
    )
    ((path, body),) = server.bodies
    prompt = body.pop("prompt")
    assert path == "/v1/completions" and len(prompt) == 9 and set(prompt) <= {5, 6}
    assert body == {
        "model": "m", "max_tokens": 3, "stream": True, "temperature": 0.5, "ignore_eos": True, "logprobs": 0,
        "top_k": 4, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip


def test_failures_are_counted_by_kind_and_the_rest_is_measured(tmp_path):
    faults = {0: 429, 1: "cut", 2: "error", 3: 429, 4: "hang"}
    found, shown = bench(
        f"--requests 12 --concurrency 3 --output-tokens 4 --warmup 0 --timeout 2 --dump {tmp_path / 'd'}",
        Scripted(faults),
    )
    (r,) = found["runs"]
    assert r["errors"] == {"HTTP 429": 2, "disconnected": 1, "error event": 1, "timeout": 1}
    assert (r["failed"], r["output_tokens"]) == (5, 28)
    assert "2 x HTTP 429" in shown
    dumped = [json.loads(line) for line in (tmp_path / "d").read_text().splitlines()]
    assert Counter(d["error"] for d in dumped) == {"": 7, **r["errors"]}
    assert len({d["sha256"] for d in dumped if not d["error"]}) == 1


def test_a_server_that_is_not_there_is_refused_not_measured():
    with pytest.raises(SystemExit, match="connection refused"):
        bench("--url http://127.0.0.1:9 --requests 2", Scripted())


def test_an_open_loop_does_not_wait_for_answers():
    server = Scripted(pause=0.2)
    found, _ = bench("--rate 200 --requests 12 --output-tokens 2 --warmup 0", server)
    assert server.most == 12
    assert found["runs"][0]["failed"] == 0 and found["runs"][0]["lag"] is not None


def test_a_kept_connection_that_the_server_closed_is_no_failure():
    server = Scripted()
    server.hangs_up = True
    found, _ = bench("--requests 8 --concurrency 2 --output-tokens 2 --warmup 0", server)
    assert (found["runs"][0]["failed"], len(server.bodies)) == (0, 8)


def test_without_usage_it_says_that_chunks_are_counted():
    found, shown = bench("--requests 2 --concurrency 1 --output-tokens 3 --warmup 0", Scripted(usage=False))
    assert (found["runs"][0]["tokens_from"], found["runs"][0]["output_tokens"]) == ("chunks", 6)
    assert "counted as chunks" in shown


def test_two_servers_take_turns_and_are_compared_round_by_round(tmp_path):
    slow, fast = Scripted(pause=0.06), Scripted(pause=0.01)
    found, shown = bench(
        "--label slow --compare {1} fast --rounds 3 --concurrency 2 --requests 4 --output-tokens 5 "
        f"--json {tmp_path / 'j'}",
        slow,
        fast,
    )
    assert [r["label"] for r in found["runs"]] == ["slow", "fast", "fast", "slow", "slow", "fast"]
    ratio = found["ratios"]["concurrency 2"]
    assert ratio["output_tokens_per_second"]["min"] > 1 > ratio["ttft_p50"]["max"]
    assert "fast / slow" in shown
    # Both had the same prompts in a round, others in the next.
    asked = [[b["messages"][0]["content"] for _, b in s.bodies[4:]] for s in (slow, fast)]
    assert sorted(asked[0]) == sorted(asked[1]) and len(set(asked[0])) == 12
    written = json.loads((tmp_path / "j").read_text())
    assert written["runs"] == found["runs"] and written["machine"]["cores"] >= 1
    assert "127.0.0.1" not in json.dumps(written) and str(tmp_path) not in json.dumps(written)


def test_the_exit_status_tells_whether_all_went_well(monkeypatch):
    runs = [{"failed": 0}, {"failed": 1}]

    async def found(args, show):
        return {"runs": runs}

    monkeypatch.setattr(serve, "benchmark", found)
    assert serve.main(["--model", "m"]) == 1
    runs.pop()
    assert serve.main(["--model", "m"]) == 0


@pytest.mark.parametrize(
    "argv",
    ["--prompt-tokens 5", "--url ftp://x", "--concurrency 0", "--rate -1", "--compare http://x A", "--extra-body 3"],
)
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        serve.parse(["--model", "m", *argv.split()])
    assert e.value.code == 2
