"""What a request may ask for. Everything here is cheap, pure and runs before any token is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from daemon.api.errors import ApiError, bad_request, context_length_exceeded
from daemon.api.schemas import ChatRequest, CompletionRequest, ContentPart, Message, Prompt, SamplingRequest
from daemon.control.policy.priority import HIGHEST, LOWEST, PRIORITIES

MAX_MESSAGES = 8192
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_CACHE_SALT = 256
_MAX_INT = (1 << 31) - 1  # of anything that counts tokens
ROLES = ("system", "developer", "user", "assistant", "tool")

# Refused fields that have a harmless value beside null, false and empty.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "response_format": lambda v: v == {"type": "text"},
    "tool_choice": lambda v: v in ("none", "auto"),
    "function_call": lambda v: v in ("none", "auto"),
    "modalities": lambda v: v == ["text"],
    "truncate_prompt_tokens": lambda v: v == -1,
}
_REFUSED = (
    *("use_beam_search", "prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens"),
    *("include_stop_str_in_output", "return_token_ids", "allowed_token_ids", "bad_words", "logits_processors"),
    *("response_format", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
_REFUSED_CHAT = (
    *("tools", "tool_choice", "functions", "function_call", "modalities", "audio", "web_search_options"),
    *("chat_template", "chat_template_kwargs", "continue_final_message", "documents"),
)


class Limits(NamedTuple):
    """The bounds that depend on the configuration and the model."""

    vocab_size: int
    max_choices: int  # largest `n`
    max_queued: int  # choices of one HTTP request, over all its prompts
    max_prompt_tokens: int  # 0: what the model allows
    max_output_tokens: int  # where a request names none


def check_chat(request: ChatRequest, limits: Limits) -> None:
    """Raise ApiError (400) naming the field that cannot be served."""
    tools_off = request.tool_choice == "none"
    for name in _REFUSED_CHAT:
        if not (tools_off and name == "tools"):
            _refuse(request, name)
    check_sampling(request, limits)
    check_messages(request.messages)
    _whole(request.max_completion_tokens, "max_completion_tokens", 1)
    _whole(request.top_logprobs, "top_logprobs", 0, MAX_LOGPROBS)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")


def check_completion(request: CompletionRequest, limits: Limits) -> None:
    """Raise ApiError (400) naming the field that cannot be served."""
    _refuse(request, "suffix")
    check_sampling(request, limits)
    _whole(request.logprobs, "logprobs", 0, MAX_LOGPROBS)
    if request.echo and request.logprobs is not None:
        raise bad_request("`echo` together with `logprobs` is not supported.", "echo")
    prompts = split_prompts(request.prompt)
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_tokens(prompt, limits.vocab_size, "prompt")
    if len(prompts) * (request.n or 1) > limits.max_queued:
        raise bad_request(
            f"{len(prompts)} prompts times n={request.n or 1} is more than {limits.max_queued} choices.", "prompt"
        )


def check_sampling(request: SamplingRequest, limits: Limits) -> None:
    """The fields that chat and text completions share."""
    for name in _REFUSED:
        _refuse(request, name)
    if request.best_of not in (None, request.n or 1):
        raise _unsupported("best_of")
    _number(request.temperature, "temperature", 0, 2)
    _number(request.top_p, "top_p", 0, 1, above=True)
    _number(request.min_p, "min_p", 0, 1)
    _whole(request.top_k, "top_k", -1)
    for name in ("presence_penalty", "frequency_penalty"):
        _number(getattr(request, name), name, -2, 2)
    _number(request.repetition_penalty, "repetition_penalty", 0, 100, above=True)
    _whole(request.seed, "seed", -(1 << 63), (1 << 63) - 1)
    _whole(request.n, "n", 1, limits.max_choices)
    _whole(request.max_tokens, "max_tokens", 1)
    _whole(request.min_tokens, "min_tokens", 0)
    if request.min_tokens and request.max_tokens and request.min_tokens > request.max_tokens:
        raise bad_request("`min_tokens` is larger than `max_tokens`.", "min_tokens")
    _check_stop(request)
    _check_logit_bias(request.logit_bias, limits.vocab_size)
    priority_class(request.priority)
    if request.cache_salt is not None and len(request.cache_salt) > MAX_CACHE_SALT:
        raise bad_request(f"`cache_salt` is longer than {MAX_CACHE_SALT} characters.", "cache_salt")
    if request.stream_options is not None and not request.stream:
        raise bad_request("`stream_options` needs `stream` to be true.", "stream_options")
    if request.stop_token_ids:
        if len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise bad_request(f"`stop_token_ids` holds more than {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids")
        check_tokens(request.stop_token_ids, limits.vocab_size, "stop_token_ids")


def check_messages(messages: list[Message]) -> None:
    """Raise ApiError (400) unless every message has a known role and nothing but text."""
    if not messages:
        raise bad_request("`messages` is empty.", "messages")
    if len(messages) > MAX_MESSAGES:
        raise bad_request(f"`messages` holds more than {MAX_MESSAGES} messages.", "messages")
    for i, message in enumerate(messages):
        where = f"messages.[{i}]"
        if message.role not in ROLES:
            raise bad_request(f"`role` must be one of {', '.join(ROLES)}.", f"{where}.role")
        if message.content is None and message.role != "assistant":
            raise bad_request(f"A message of role {message.role} needs content.", f"{where}.content")
        if isinstance(message.content, list):
            _check_parts(message.content, f"{where}.content")


def check_tokens(tokens: list[int], vocab_size: int, param: str) -> None:
    """Raise ApiError (400) unless every id is in the vocabulary."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise bad_request(f"`{param}` holds a token id outside 0..{vocab_size - 1}.", param)


def check_length(prompt_tokens: int, max_tokens: int, max_model_len: int, limits: Limits, param: str) -> None:
    """Raise ApiError (400) unless prompt and output fit the context. `max_tokens` 0: none was asked for."""
    if prompt_tokens == 0:
        raise bad_request("The prompt is empty.", param)
    if limits.max_prompt_tokens and prompt_tokens > limits.max_prompt_tokens:
        raise context_length_exceeded(
            f"The prompt has {prompt_tokens} tokens; this server takes at most {limits.max_prompt_tokens}.", param
        )
    if prompt_tokens + max(max_tokens, 1) > max_model_len:
        asked = f"{prompt_tokens} in the prompt"
        asked += f" and {max_tokens} for the output" if max_tokens else " and at least one for the output"
        raise context_length_exceeded(
            f"This model's maximum context length is {max_model_len} tokens; you asked for {asked}.", param
        )


def split_prompts(prompt: Prompt) -> list[str | list[int]]:
    """The prompts of any of the four forms: a string, strings, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("`prompt` is empty.", "prompt")
    if all(isinstance(p, int) for p in prompt):
        return [list[int](prompt)]  # type: ignore[arg-type]
    if all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) for p in prompt):
        return list(prompt)  # type: ignore[arg-type]
    raise bad_request("`prompt` mixes strings, token ids and lists of token ids.", "prompt")


def stop_strings(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or ())


def priority_class(priority: int | str | None, default: int = 0) -> int:
    """The scheduling class of a number or a word; lower goes first. Raises ApiError (400)."""
    if priority is None:
        return default
    if isinstance(priority, str):
        if priority not in PRIORITIES:
            raise bad_request(f"`priority` must be a number or one of {', '.join(PRIORITIES)}.", "priority")
        return PRIORITIES[priority]
    _whole(priority, "priority", LOWEST, HIGHEST)
    return priority


def _check_parts(parts: list[ContentPart], where: str) -> None:
    for j, part in enumerate(parts):
        if part.type != "text" or part.text is None:
            raise bad_request("Only parts of type text, with a `text`, are supported.", f"{where}.[{j}]")


def _check_stop(request: SamplingRequest) -> None:
    stops = stop_strings(request.stop)
    if len(stops) > MAX_STOPS:
        raise bad_request(f"`stop` holds more than {MAX_STOPS} strings.", "stop")
    if not all(0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise bad_request(f"A stop string must have 1 to {MAX_STOP_CHARS} characters.", "stop")


def _check_logit_bias(bias: dict[str, float] | None, vocab_size: int) -> None:
    if not bias:
        return
    if len(bias) > MAX_LOGIT_BIAS:
        raise bad_request(f"`logit_bias` holds more than {MAX_LOGIT_BIAS} entries.", "logit_bias")
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 16 and int(key) < vocab_size):
            raise bad_request(f"`logit_bias` keys must be token ids in 0..{vocab_size - 1}.", "logit_bias")
        _number(value, "logit_bias", -100, 100)


def _refuse(request: object, name: str) -> None:
    value = getattr(request, name)
    # `==` on purpose: 0, 0.0, false, "", [] and {} ask for nothing.
    if value is None or value in (False, "", [], {}) or (name in _HARMLESS and _HARMLESS[name](value)):
        return
    raise _unsupported(name)


def _unsupported(name: str) -> ApiError:
    return bad_request(f"`{name}` with this value is not supported.", name, "unsupported_parameter")


def _number(value: float | None, name: str, low: float, high: float, *, above: bool = False) -> None:
    """`low` itself is refused where `above`."""
    if value is None:
        return
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise bad_request(f"`{name}` must be {bounds}, got {value:g}.", name)


def _whole(value: int | None, name: str, low: int, high: int = _MAX_INT) -> None:
    if value is not None and not low <= value <= high:
        bounds = f"at least {low}" if high == _MAX_INT and value < low else f"from {low} to {high}"
        raise bad_request(f"`{name}` must be {bounds}.", name)
