"""Grammars: what they cost, what a hostile one costs the others, and whether answers to random JSON schemas validate.

    .venv/bin/python -m bench.grammar [--quick] [--json FILE]

Settings take turns within each round, so read the ratios: the absolute numbers are those of a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from jsonschema import Draft202012Validator

from bench.json_schemas import random_schema
from bench.live import TIMEOUT, Client, Daemon, serving
from bench.machine import environment
from bench.measures import distribution
from daemon.models import store
from daemon.models.grammar.source import GrammarKind, GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.model_config import read_model_config
from daemon.models.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
CONCURRENCY = 16
OUTPUT = 64  # tokens
VICTIMS, VICTIM_OUTPUT = 8, 120  # plain streams beside hostile requests, and their tokens
_LONG = {  # no answer of OUTPUT tokens completes it
    "type": "object",
    "properties": {
        "rows": {
            "type": "array",
            "minItems": 500,
            "items": {
                "type": "object",
                "properties": {"id": {"type": "integer"}, "name": {"type": "string", "maxLength": 20}},
                "required": ["id", "name"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["rows"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "save", "parameters": _LONG}}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"ignore_eos": True},
    "logprobs": {"ignore_eos": True, "logprobs": True, "top_logprobs": 5},
    "penalties": {"ignore_eos": True, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "grammar": {"response_format": {"type": "json_schema", "json_schema": {"name": "rows", "schema": _LONG}}},
    "tools": {"tools": [_TOOL], "tool_choice": "required"},
}


def _chain(i: int) -> str:
    """Return rules that are nested too deeply for the compiler's stack."""
    return "start: r0\n" + "".join(f'r{k}: r{k + 1} | "x{i}"\n' for k in range(4000)) + 'r4000: "z"'


# Each request is another one, so that no reply is known already.
HOSTILE: dict[str, Callable[[int], dict[str, Any]]] = {
    "automaton": lambda i: {"guided_json": {"type": "integer", "multipleOf": 9999991 + 2 * i}},
    "rules": lambda i: {"guided_grammar": _chain(i)},
    "masks": lambda i: {"guided_regex": f"(.*a.{{200}}b{i})"},
}


# -- throughput


def throughput(daemon: Daemon, rounds: int, requests: int) -> dict[str, Any]:
    """Return tokens a second of each mode by round, and the ratios to plain sampling."""
    for mode in MODES:
        _tokens_per_second(daemon, mode, CONCURRENCY, seed=0)  # warms up
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    names = list(MODES)
    for turn in range(rounds):
        for mode in names[turn % len(names) :] + names[: turn % len(names)]:
            found[mode].append(_tokens_per_second(daemon, mode, requests, seed=1 + turn))
    ratios = {
        mode: statistics.median(a / b for a, b in zip(values, found["plain"], strict=True))
        for mode, values in found.items()
    }
    return {"requests": requests, "tokens_per_second": found, "ratio_to_plain": ratios}


def _tokens_per_second(daemon: Daemon, mode: str, requests: int, seed: int) -> float:
    def one(i: int) -> int:
        messages = [{"role": "user", "content": f"Write table {seed}-{i} as JSON."}]
        body = {"messages": messages, "max_tokens": OUTPUT, "temperature": 1, "seed": i} | MODES[mode]
        usage: dict[str, int] = json.loads(daemon.post(CHAT, body).read())["usage"]
        return usage["completion_tokens"]

    began = perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        tokens = sum(pool.map(one, range(requests)))
    return tokens / (perf_counter() - began)


# -- hostile requests


async def victims(daemon: Daemon, rounds: int) -> dict[str, Any]:
    """Return the gaps between tokens of plain streams, alone and beside each kind of hostile requests."""
    found: dict[str, list[list[float]]] = {name: [] for name in ("alone", *HOSTILE)}
    sent: Counter[str] = Counter()
    await _gaps(daemon, seed=0)
    for turn in range(rounds):
        found["alone"].append(await _gaps(daemon, 1 + turn))
        for name in HOSTILE:
            with _hostile(daemon, name, sent):
                found[name].append(await _gaps(daemon, 1 + turn))
    p99 = {name: [_p99(gaps) for gaps in runs] for name, runs in found.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(p99[name], p99["alone"], strict=True)) for name in HOSTILE
    }
    return {"itl_p99": p99, "ratio_to_alone": ratios, "hostile_requests": dict(sent)}


async def _gaps(daemon: Daemon, seed: int) -> list[float]:
    client = Client(daemon, seed)
    for _ in range(VICTIMS):
        client.send(32, VICTIM_OUTPUT)
    outcomes = await client.finish()
    return [b - a for o in outcomes for a, b in zip(o.arrivals, o.arrivals[1:], strict=False)]


def _p99(values: list[float]) -> float:
    found = distribution(values)
    assert found is not None
    return found["p99"]


@contextmanager
def _hostile(daemon: Daemon, name: str, sent: Counter[str]) -> Iterator[None]:
    """Send hostile requests, one after the other from two clients, until the context ends."""
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection(*daemon.address, timeout=TIMEOUT)
            body = json.dumps(
                {"prompt": f"{sent[name]}", "max_tokens": 100, "model": daemon.model} | HOSTILE[name](sent[name])
            )
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            connection.getresponse().read()
            sent[name] += 1

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# -- random schemas


def schemas(daemon: Daemon, count: int) -> dict[str, Any]:
    """Ask for one answer to each of `count` random schemas, at temperature 1."""

    def one(seed: int) -> str:
        schema = random_schema(seed)
        messages = [{"role": "user", "content": f"Make up an example of this JSON schema: {json.dumps(schema)}"}]
        form = {"type": "json_schema", "json_schema": {"name": "example", "schema": schema, "strict": True}}
        body = {"messages": messages, "max_tokens": 400, "temperature": 1, "seed": seed, "response_format": form}
        choice = json.loads(daemon.post(CHAT, body).read())["choices"][0]
        if choice["finish_reason"] != "stop":
            return "truncated"
        try:
            value = json.loads(choice["message"]["content"])
        except ValueError:
            return "not JSON"
        return "valid" if Draft202012Validator(schema).is_valid(value) else "invalid"

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return {"schemas": count} | Counter(pool.map(one, range(count)))


# -- the library alone


def masks(count: int) -> dict[str, Any]:
    """Return the CPU seconds of compilations and masks, over random schemas with the demo model's tokens."""
    path = store.resolve("demo", "auto", print)
    config = read_model_config(path)
    began = thread_time()
    vocabulary = Vocabulary(tokenizer := Tokenizer(path), config.vocab_size, config.eos_token_ids)
    found: dict[str, list[float]] = {"compile": [], "first mask": [], "mask": [], "token": []}
    loaded = thread_time() - began
    for seed in range(count):
        schema = random_schema(seed)
        grammar = to_llguidance(GrammarSource(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
        began = thread_time()
        matcher = vocabulary.compile(grammar)
        found["compile"].append(thread_time() - began)
        for i in range(60):
            began = thread_time()
            mask = matcher.compute_bitmask()
            found["mask" if i else "first mask"].append(thread_time() - began)
            token = _some_token(mask, seed + i)
            if token in config.eos_token_ids:
                break
            began = thread_time()
            matcher.consume_token(token)
            found["token"].append(thread_time() - began)
    return {"vocab_size": tokenizer.vocab_size, "load": loaded} | {k: distribution(v) for k, v in found.items()}


def _some_token(mask: bytes, seed: int) -> int:
    allowed = [8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
    return allowed[seed * 2654435761 % len(allowed)]


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the report."""
    out = [f"throughput at {CONCURRENCY}, as ratios to plain sampling (medians of rounds):"]
    for mode, ratio in found["throughput"]["ratio_to_plain"].items():
        rate = statistics.median(found["throughput"]["tokens_per_second"][mode])
        out.append(f"  {mode:<10}{ratio:6.2f}   {rate:7.1f} tok/s")
    out.append(f"ITL p99 of {VICTIMS} plain streams beside hostile requests, as ratios to the same alone:")
    for name, ratio in found["hostile"]["ratio_to_alone"].items():
        out.append(f"  {name:<10}{ratio:6.2f}   {found['hostile']['hostile_requests'].get(name, 0)} requests")
    out.append(f"random schemas: {found['schemas']}")
    out.append("CPU milliseconds (p50, p99):")
    for what in ("compile", "first mask", "mask", "token"):
        times = found["masks"][what]
        out.append(f"  {what:<10}{1e3 * times['p50']:8.3f}{1e3 * times['p99']:8.3f}")
    return out


def main() -> None:
    """Measure, print the report and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of everything: a check of the benchmark")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48, help="of each setting and round")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds, requests, count = (1, 16, 16) if args.quick else (args.rounds, args.requests, args.schemas)
    machine = environment(["llguidance", "torch", "numpy"])
    found: dict[str, Any] = {"masks": masks(count)}
    with serving("--devices", "cpu") as daemon:
        found["throughput"] = throughput(daemon, rounds, requests)
        found["hostile"] = asyncio.run(victims(daemon, rounds))
        found["schemas"] = schemas(daemon, count)
    found["load_after"] = os.getloadavg()[0]
    print("\n".join(lines(found)))
    if args.json:
        args.json.write_text(json.dumps(machine | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
