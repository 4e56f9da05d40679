"""The options of the HTTP API: its address, its limits and what it keeps. A part of `daemon.config`."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.option import MAX_TOKENS
from daemon.option import declare as _option


@dataclass(slots=True)
class HttpOptions:
    """The settings of the HTTP API. Sizes are in bytes and durations in seconds."""

    host: str = _option(
        "127.0.0.1",
        "http",
        "Address to listen on. Any but loopback needs `api_key_file` or `allow_unauthenticated`.",
    )
    port: int = _option(8000, "http", "TCP port to listen on. 0: any free port.", at_least=0, at_most=65535)
    frontends: int = _option(
        1,
        "http",
        "Number of HTTP processes. They share one listening socket. The default on GPUs is at most two for each "
        "engine, and one for every four CPUs.",
        gpu=4,
        at_least=1,
        at_most=16,
    )
    standby_frontend: bool = _option(
        True,
        "http",
        "Keep one more HTTP process loaded, which takes over at once when one of them dies. It costs its memory.",
    )
    api_key_file: str = _option(
        "",
        "http",
        "File with one API key per line. Empty: clients need no key. `llumctl reload` reads it again.",
    )
    allow_unauthenticated: bool = _option(False, "http", "Allow a `host` other than loopback without API keys.")
    max_body: int = _option(
        8 << 20,
        "http",
        "Maximum size of a request body. A larger one gets status 413.",
        "bytes",
        at_least=1 << 10,
        at_most=1 << 30,
    )
    max_header: int = _option(
        8190,
        "http",
        "Maximum size of the request line, and of each header. A longer one gets status 400.",
        "bytes",
        at_least=1 << 10,
        at_most=1 << 20,
    )
    max_grammar: int = _option(
        256 << 10,
        "http",
        "Maximum size of a JSON schema or a grammar that constrains an output. A larger one gets status 400.",
        "bytes",
        at_least=1 << 10,
        at_most=16 << 20,
    )
    grammar_timeout: float = _option(
        2.0,
        "http",
        "CPU time that it may take to compile such a schema or grammar. One that takes longer gets status 400.",
        "seconds",
        at_least=0.1,
        at_most=60,
    )
    body_memory: int = _option(
        64 << 20,
        "http",
        "Memory of each frontend for request bodies that are not tokenised yet. The first 64 KiB of each do not "
        "count. A request that finds it full gets status 503.",
        "bytes",
        at_least=1 << 10,
        at_most=1 << 40,
    )
    max_connections: int = _option(
        0,
        "http",
        "Maximum number of connections of each frontend. At the limit, the one that is idle for longest is closed; "
        "if none is idle, a new one gets status 503. 0: what the limit of open files allows for each to outlive its "
        "frontend.",
        "connections",
        at_least=0,
        at_most=1 << 17,
    )
    keep_alive: float = _option(
        75.0, "http", "Time after which a connection without a request is closed.", "seconds", at_least=1
    )
    allowed_hosts: list[str] = _option(
        [],
        "http",
        "Host names, separated by commas, under which clients reach this server; any other `Host` gets status 403. "
        "Empty: a server on a loopback address without API keys accepts only names of this machine, other servers "
        "accept every name. `*`: every name.",
    )
    allowed_origins: list[str] = _option(
        [],
        "http",
        "Origins of web pages that may use this server, for example `https://chat.example.com`, separated by commas. "
        "Pages of this machine may use a server on a loopback address without API keys in any case. `*`: every page.",
    )
    max_prompt_tokens: int = _option(
        0,
        "http",
        "Maximum length of a prompt, below `max_model_len`. 0: the limit of the model.",
        "tokens",
        at_least=0,
        at_most=MAX_TOKENS,
    )
    max_output_tokens: int = _option(
        4096,
        "http",
        "Maximum length of the output of a request that sets no limit itself.",
        "tokens",
        at_least=1,
        at_most=MAX_TOKENS,
    )
    max_queued: int = _option(
        512,
        "http",
        "Maximum number of unfinished requests in each frontend; those of high priority may be an eighth more. "
        "Further requests get status 429.",
        "requests",
        at_least=1,
        at_most=1 << 16,
    )
    max_client_requests: int = _option(
        0,
        "http",
        "Maximum number of unfinished requests of one client (a tenant, a key or an address) in each frontend. "
        "Further ones get status 429. 0: its share of `max_queued` is the only limit.",
        "requests",
        at_least=0,
        at_most=1 << 16,
    )
    queue_timeout: float = _option(
        0.0,
        "http",
        "Maximum time from the arrival of a request to its first output token. Then it gets status 429. 0: no limit "
        "but `request_deadline`.",
        "seconds",
        at_least=0.1,
        or_zero=True,
    )
    max_choices: int = _option(
        8,
        "http",
        "Maximum of the request parameter `n` (choices for one request). It is also never above `max_queued`.",
        "choices",
        at_least=1,
        at_most=1024,
    )
    max_requested_tokens: int = _option(
        0,
        "http",
        "Maximum length of the output that a request may ask for. 0: what fits with its prompt.",
        "tokens",
        at_least=0,
        at_most=MAX_TOKENS,
    )
    max_messages: int = _option(
        8192, "http", "Maximum number of messages in a request.", "messages", at_least=1, at_most=1 << 16
    )
    max_tools: int = _option(
        512, "http", "Maximum number of tools in a request.", "tools", at_least=0, at_most=1 << 12
    )
    max_stops: int = _option(16, "http", "Maximum number of stop strings in a request.", at_least=0, at_most=64)
    max_logit_bias: int = _option(
        1024, "http", "Maximum number of tokens in `logit_bias` of a request.", "tokens", at_least=0, at_most=1024
    )
    max_logprobs: int = _option(
        20,
        "http",
        "Maximum number of alternatives to each token whose logprobs a request may ask for.",
        "tokens",
        at_least=0,
        at_most=20,
    )
    request_deadline: float = _option(
        600.0,
        "http",
        "Maximum time from the arrival of a request to its end. Then it ends with an error. 0: no limit.",
        "seconds",
        at_least=0.1,
        or_zero=True,
    )
    journal_memory: int = _option(
        64 << 20,
        "http",
        "Shared memory of each frontend for the prompts and outputs of its unfinished requests (journal). "
        "While it is full, new requests get status 429.",
        "bytes",
        at_least=1 << 20,
        below=4 << 30,
    )
    outbox_memory: int = _option(
        32 << 20,
        "http",
        "Shared memory of each frontend for response bytes on their way (outbox). They survive the frontend there. "
        "While it is full, new requests get status 429.",
        "bytes",
        at_least=1 << 20,
        below=4 << 30,
    )
    keep_streams: float = _option(
        60.0,
        "http",
        "How long a stream whose client has asked to keep it (`X-Llumd-Keep: 1`) can be read again after its end; "
        "less if the journal needs its room. 0: no stream is kept.",
        "seconds",
        at_least=1,
        at_most=86400,
        or_zero=True,
    )
    heartbeat: float = _option(
        0.0,
        "http",
        "Send an SSE comment after this time without output. 0: send none.",
        "seconds",
        at_least=0.01,
        or_zero=True,
    )
    access_log: bool = _option(
        False,
        "http",
        "Log a line for each HTTP request: client, method, path, status, duration, tokens and ids; never its text. "
        "With log level `debug` the line is written in any case.",
    )
