"""Load generator for an OpenAI-compatible server: TTFT, ITL, TPOT, throughput, goodput.

    python -m bench.serve --url http://127.0.0.1:8000 --model demo --concurrency 1,8,16

bench/README.md explains each number and how to compare servers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop

from bench import machine, prompts
from bench.connection import Connection, Pool
from bench.measures import Objectives, ratios, summary
from bench.stream import Outcome, StreamReader

Run = tuple[dict[str, Any], list[Outcome]]

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
COLUMNS = {"ttft": ("p50", "p99"), "itl_token": ("p50", "p99"), "tpot": ("p50",), "e2e": ("p50", "p99")}


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: a fixed number in flight (`rate` 0), or at fixed times, independent of the server."""

    concurrency: int = 0
    rate: float = 0.0
    arrivals: str = "poisson"
    cv: float = 1.0

    def __str__(self) -> str:
        if not self.rate:
            return f"concurrency {self.concurrency}"
        return f"{self.rate:g}/s {self.arrivals}" + (f" cv {self.cv:g}" if self.arrivals == "gamma" else "")


@dataclass(frozen=True, slots=True)
class Server:
    """One server under load."""

    label: str
    pool: Pool
    model: str


# -- one request -------------------------------------------------------------------------------


async def complete(pool: Pool, request: bytes, index: int, timeout: float) -> Outcome:
    """Send one request and read its stream. Errors of the server go to `Outcome.error` and are not raised."""
    outcome = Outcome(index, sent=perf_counter())
    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout):
            reader = StreamReader(outcome)
            while True:
                connection = await pool.take()
                try:
                    status = await connection.exchange(request, reader.feed)
                    break
                except ConnectionError:
                    if not connection.stale:
                        raise
            reader.end(perf_counter(), status)
            pool.give(connection)
            return outcome
    except TimeoutError:
        outcome.error = "timeout"
    except ConnectionRefusedError:
        outcome.error = "connection refused"
    except OSError as e:
        outcome.error = "disconnected" if isinstance(e, ConnectionError) else f"cannot connect: {e.strerror}"
    outcome.ended = perf_counter()
    if connection is not None:
        connection.close()
    return outcome


# -- many requests -----------------------------------------------------------------------------


async def closed_loop(pool: Pool, requests: Sequence[bytes], concurrency: int, timeout: float) -> list[Outcome]:
    """Keep `concurrency` requests in flight until all are done."""
    pending = iter(enumerate(requests))

    async def user() -> list[Outcome]:
        return [await complete(pool, request, i, timeout) for i, request in pending]

    users = await asyncio.gather(*(user() for _ in range(min(concurrency, len(requests)))))
    return sorted((o for done in users for o in done), key=lambda o: o.index)


async def open_loop(pool: Pool, requests: Sequence[bytes], times: Sequence[float], timeout: float) -> list[Outcome]:
    """Send request i at times[i] seconds, even if many are still in flight."""
    start = perf_counter()
    running = []
    for i, (request, at) in enumerate(zip(requests, times, strict=True)):
        if (wait := start + at - perf_counter()) > 0:
            await asyncio.sleep(wait)
        running.append(asyncio.create_task(complete(pool, request, i, timeout)))
    outcomes = await asyncio.gather(*running)
    for outcome, at in zip(outcomes, times, strict=True):
        outcome.lag = max(0.0, outcome.sent - start - at)
    return outcomes


async def run(server: Server, load: Load, requests: Sequence[bytes], args: argparse.Namespace) -> Run:
    """Run one load. Return its summary and its outcomes."""
    gc.collect()
    gc.disable()
    cpu, start = _cpu_seconds(), perf_counter()
    if load.rate:
        times = prompts.arrival_times(len(requests), load.rate, arrivals=load.arrivals, cv=load.cv, seed=args.seed)
        outcomes = await open_loop(server.pool, requests, times, args.timeout)
    else:
        outcomes = await closed_loop(server.pool, requests, load.concurrency, args.timeout)
    seconds, cpu = max(o.ended for o in outcomes) - start, _cpu_seconds() - cpu
    gc.enable()
    objectives = Objectives(_ms(args.slo_ttft), _ms(args.slo_tpot), _ms(args.slo_e2e))
    found = summary(outcomes, seconds=seconds, cpu_seconds=cpu, objectives=objectives)
    return {"label": server.label, "load": str(load), **found}, outcomes


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _ms(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


# -- request bodies ----------------------------------------------------------------------------


def build_requests(server: Server, count: int, seed: int, args: argparse.Namespace) -> list[bytes]:
    """Return complete HTTP requests, built before the clock starts, because their cost is not the server's."""
    texts: Sequence[Any]
    if args.prompt_tokens:
        ids = (args.token_ids[0], args.token_ids[1])
        texts = prompts.token_prompts(
            count, args.prompt_tokens, seed=seed, ids=ids, shared_tokens=args.shared_prefix_words
        )
    else:
        texts = prompts.word_prompts(count, args.prompt_words, seed=seed, shared_words=args.shared_prefix_words)
    key = os.environ.get("OPENAI_API_KEY", "")
    bodies = (json.dumps(request_body(server.model, prompt, args)).encode() for prompt in texts)
    return [server.pool.request(PATHS[args.endpoint], body, key) for body in bodies]


def request_body(model: str, prompt: str | list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON body of one request."""
    body: dict[str, Any] = {"model": model, "max_tokens": args.output_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if args.continuous_usage:
        body["stream_options"]["continuous_usage_stats"] = True
    body["temperature"] = args.temperature
    if args.ignore_eos:
        body["ignore_eos"] = True
    if args.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if args.logprobs:
        body["logprobs"] = True if args.endpoint == "chat" else 0
    return body | args.extra_body


# -- benchmark -----------------------------------------------------------------------


async def benchmark(args: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Run all loads and rounds; with two servers each round runs both, in alternating order."""
    found: dict[str, Any] = {"machine": machine.describe(), "settings": _settings(args), "runs": []}
    servers = [Server(args.label, Pool(args.url), args.model)]
    if args.compare:
        servers.append(Server(args.compare[1], Pool(args.compare[0]), args.compare_model or args.model))
    dump: list[dict[str, Any]] = []
    for server in servers:
        await _warm_up(server, args)
    show(header())
    for load in loads(args):
        count = args.requests or max(16, 4 * load.concurrency)
        for round_ in range(args.rounds):
            for server in servers if round_ % 2 == 0 else servers[::-1]:
                # New prompts for each load and round, so that no prefix cache holds them.
                requests = build_requests(server, count, args.seed + _salt(load, round_), args)
                result, outcomes = await run(server, load, requests, args)
                found["runs"].append({**result, "round": round_})
                dump += [_dumped(result, round_, o) for o in outcomes]
                show(row(result))
    if args.compare:
        found["ratios"] = _compare(servers, found["runs"])
        show(_ratio_table(servers, found["ratios"]))
    for server in servers:
        server.pool.close()
    _write(args, found, dump)
    return found


def loads(args: argparse.Namespace) -> list[Load]:
    """Return the loads of the command line."""
    if args.rate:
        return [Load(rate=rate, arrivals=args.arrivals, cv=args.cv) for rate in args.rate]
    return [Load(concurrency=c) for c in args.concurrency]


def _salt(load: Load, round_: int) -> int:
    return 1_000_003 * (round_ + 1) + 7919 * load.concurrency + int(load.rate * 1000)


async def _warm_up(server: Server, args: argparse.Namespace) -> None:
    if not args.warmup:
        return
    requests = build_requests(server, args.warmup, args.seed, args)
    outcomes = await closed_loop(server.pool, requests, args.warmup, args.timeout)
    failed = [o.error for o in outcomes if o.error]
    if len(failed) == len(outcomes):
        raise SystemExit(f"{server.label}: every warm-up request failed: {', '.join(sorted(set(failed)))}")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    hidden = {"url", "compare", "json", "dump"}  # addresses and paths stay private
    return {k: v for k, v in vars(args).items() if k not in hidden}


def _dumped(result: dict[str, Any], round_: int, o: Outcome) -> dict[str, Any]:
    return {
        "label": result["label"],
        "load": result["load"],
        "round": round_,
        "index": o.index,
        "error": o.error,
        "finish": o.finish,
        "output_tokens": o.output_tokens,
        "sha256": o.digest(),
        "of": "tokens" if o.tokens else "text",
    }


def _compare(servers: Sequence[Server], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def by_round(server: Server, load: str) -> list[dict[str, Any]]:
        return sorted((r for r in runs if r["label"] == server.label and r["load"] == load), key=lambda r: r["round"])

    names = dict.fromkeys(r["load"] for r in runs)
    return {load: ratios(by_round(servers[0], load), by_round(servers[1], load)) for load in names}


def _write(args: argparse.Namespace, found: dict[str, Any], dump: Sequence[dict[str, Any]]) -> None:
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.dump:
        args.dump.write_text("".join(json.dumps(line) + "\n" for line in dump))


# -- table --------------------------------------------------------------------------------


def header() -> str:
    """Return the first line of the table."""
    groups = "".join(f"{name.replace('_', '/'):>9} ms{', '.join(of):>9} " for name, of in COLUMNS.items())
    return f"{'server':<10}{'load':<20}{'done':>5}{'failed':>7}{'tok/s':>9}{'client':>7}{groups}".rstrip()


def row(r: dict[str, Any]) -> str:
    """Return a run's line of the table, followed by remarks if there are any."""
    line = f"{r['label'][:9]:<10}{r['load'][:19]:<20}{r['requests'] - r['failed']:>5}{r['failed']:>7}"
    line += f"{r['output_tokens_per_second']:>9.1f}{r['client_cpu_seconds'] / r['seconds']:>7.0%}"
    for name, of in COLUMNS.items():
        values = "-" if r[name] is None else "".join(f"{r[name][p] * 1e3:10.1f}" for p in of)
        line += f"{values:>21} "
    return "\n".join([line.rstrip(), *_remarks(r)])


def _remarks(r: dict[str, Any]) -> list[str]:
    lines = [f"  failed: {count} x {kind}" for kind, count in r["errors"].items()]
    if r["tokens_from"] == "chunks":
        lines.append("  the server sent no usage: tokens are counted as chunks")
    if r["lag"]["p99"] > 0.010:
        lines.append(f"  the client fell behind its schedule: p99 {r['lag']['p99'] * 1e3:.0f} ms late")
    if r["goodput"] is not None:
        lines.append(f"  goodput {r['goodput']:.2f} req/s, objectives met by {r['objectives_met']:.1%}")
    return lines


def _ratio_table(servers: Sequence[Server], found: dict[str, Any]) -> str:
    lines = [f"{servers[1].label} / {servers[0].label} (median of the rounds, range)"]
    for load, values in found.items():
        for name, v in values.items():
            lines.append(f"  {load:<22}{name:<28}{v['median']:7.3f}   {v['min']:.3f} .. {v['max']:.3f}")
    return "\n".join(lines)


# -- command line ------------------------------------------------------------------------------


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        found = [kind(part) for part in text.split(",")]
        if any(n <= 0 for n in found):
            raise ValueError(text)
        return found

    return numbers


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.split("\n")[0])
    g = p.add_argument_group("server (an API key is read from OPENAI_API_KEY)")
    g.add_argument("--url", default="http://127.0.0.1:8000", help="base address, without /v1")
    g.add_argument("--model", required=True)
    g.add_argument("--label", default="A")
    g.add_argument("--endpoint", choices=sorted(PATHS), default="chat")
    g.add_argument("--compare", nargs=2, metavar=("URL", "LABEL"), help="a second server, run in alternation")
    g.add_argument("--compare-model", default="", help="the second server's name for the model")
    g.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    g = p.add_argument_group("requests")
    g.add_argument("--prompt-words", type=int, default=100)
    g.add_argument("--prompt-tokens", type=int, default=0, help="token ids instead of words (completions only)")
    g.add_argument("--token-ids", type=int, nargs=2, default=[100, 1000], metavar=("LOW", "HIGH"))
    g.add_argument("--shared-prefix-words", type=int, default=0, help="words that all prompts share at their start")
    g.add_argument("--output-tokens", type=int, default=64, help="max_tokens")
    g.add_argument("--ignore-eos", action="store_true", help="every answer is --output-tokens long")
    g.add_argument("--temperature", type=float, default=0.0)
    g.add_argument(
        "--logprobs", action="store_true", help="request logprobs, so that --dump hashes tokens instead of text"
    )
    g.add_argument("--continuous-usage", action="store_true", help="request token counts with every chunk")
    g.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="added to every request")
    g = p.add_argument_group("load")
    g.add_argument("--concurrency", type=_numbers(int), default=[1, 8, 16], help="closed loop, e.g. 1,8,16")
    g.add_argument("--rate", type=_numbers(float), help="open loop: requests a second, e.g. 2,4")
    g.add_argument("--arrivals", choices=("poisson", "gamma"), default="poisson")
    g.add_argument(
        "--cv", type=float, default=2.0, help="coefficient of variation of the gaps between gamma arrivals"
    )
    g.add_argument("--requests", type=int, default=0, help="in each run; default: four a connection, at least 16")
    g.add_argument("--warmup", type=int, default=4, help="requests before the first run, not counted")
    g.add_argument("--rounds", type=int, default=1, help="runs of each load")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("objectives for goodput, milliseconds")
    g.add_argument("--slo-ttft", type=float)
    g.add_argument("--slo-tpot", type=float)
    g.add_argument("--slo-e2e", type=float)
    g = p.add_argument_group("output")
    g.add_argument("--json", type=Path, metavar="FILE")
    g.add_argument("--dump", type=Path, metavar="FILE", help="a hash of every answer, one JSON object a line")
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check arguments; exits with status 2 if they are invalid."""
    p = parser()
    args = p.parse_args(argv)
    if args.prompt_tokens and args.endpoint == "chat":
        p.error("--prompt-tokens sends token ids, which only --endpoint completions takes")
    if args.cv <= 0 or args.rounds < 1 or args.output_tokens < 1 or args.prompt_words < 1:
        p.error("--cv, --rounds, --output-tokens and --prompt-words must be positive")
    if args.token_ids[0] >= args.token_ids[1]:
        p.error("--token-ids: LOW must be below HIGH")
    if args.compare and args.compare[1] == args.label:
        p.error("the two servers need different labels")
    for url in [args.url, *(args.compare or [])[:1]]:
        try:
            Pool(url)
        except ValueError as e:
            p.error(str(e))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Return exit status 1 if any request failed."""
    args = parse(argv)
    work: Coroutine[Any, Any, dict[str, Any]] = benchmark(args, lambda line: print(line, flush=True))
    found = uvloop.run(work)
    return 1 if any(r["failed"] for r in found["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
