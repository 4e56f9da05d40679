"""Checks of a decoded request that its schema cannot express: relations between fields, and bounds that depend on the
configuration or the model. Every check is cheap and pure, and runs before the prompt is tokenised.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple

from msgspec import UNSET

from daemon.api.errors import bad_request, context_length_exceeded
from daemon.api.params import requested_max_tokens
from daemon.api.request_identity import KEY_HEADER
from daemon.api.schemas import (
    EFFORTS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    ROLES,
    TEXT_PARTS,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    Message,
    Prompt,
    SamplingRequest,
    TokenizeRequest,
)
from daemon.api.unsupported import refuse_unsupported
from daemon.control.policy.priority import ALLOWED, LOWEST, PRIORITIES

KEEP_HEADER = "X-Llumd-Keep"
MAX_KEPT_CHOICES = 64  # of a kept stream: the ids of its events name each of them


class Limits(NamedTuple):
    """The bounds that depend on the configuration and the model."""

    vocab_size: int
    max_choices: int  # largest `n`
    max_queued: int  # choices of one HTTP request, over all its prompts
    max_prompt_tokens: int  # 0: no limit besides the model's context length
    max_output_tokens: int  # of a choice whose request sets no maximum
    max_requested_tokens: int = 0  # of a choice whose request sets one; 0: no limit besides the context length
    max_messages: int = MAX_MESSAGES
    max_stops: int = MAX_STOPS
    max_logit_bias: int = MAX_LOGIT_BIAS
    max_logprobs: int = MAX_LOGPROBS
    max_tools: int = MAX_TOOLS


def check_chat(request: ChatRequest, limits: Limits) -> None:
    """Raise ApiError (400) that names the field if the request cannot be served."""
    check_template_fields(request, limits)
    check_sampling(request, limits)
    check_messages(request.messages, limits)
    if requested_max_tokens(request) == 0 and request.prompt_logprobs is None:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise bad_request(f"`{name}` must be at least 1 in a chat, unless you ask for `prompt_logprobs`.", name)
    _check_most(request.top_logprobs, limits.max_logprobs, "top_logprobs")
    if request.top_logprobs and not request.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    if request.echo and request.logprobs:
        raise bad_request("`echo` together with `logprobs` is not supported.", "echo")


def check_completion(request: CompletionRequest, limits: Limits) -> None:
    """Raise ApiError (400) that names the field if the request cannot be served."""
    refuse_unsupported(request)
    check_sampling(request, limits)
    _check_most(request.logprobs, limits.max_logprobs, "logprobs")
    prompts = split_prompts(request.prompt)
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_tokens(prompt, limits.vocab_size, "prompt")
    n = request.n or 1
    if len(prompts) * n > limits.max_queued:
        message = f"`prompt` has {len(prompts)} prompts; times n={n} this is more than {limits.max_queued} choices."
        raise bad_request(message, "prompt")


def wants_keep(
    header: str | None,
    request: ChatRequest | CompletionRequest,
    num_prompts: int,
    keep_streams: float,
    *,
    once: bool = False,
) -> bool:
    """Return True if the answer is kept. `header`: as sent; `keep_streams`: the option; `once`: it is kept anyway.

    Raises ApiError (400) for another value than 0 or 1, and for a request that cannot be kept.
    """
    if once and num_prompts * (request.n or 1) > MAX_KEPT_CHOICES:
        message = f"A request with `{KEY_HEADER}` may have at most {MAX_KEPT_CHOICES} choices."
        raise bad_request(message, KEY_HEADER)
    if header is None or header.strip() == "0":
        return once
    if header.strip() != "1":
        raise bad_request(f"The header `{KEEP_HEADER}` must be 1 or 0.", KEEP_HEADER)
    if not request.stream:
        raise bad_request(f"`{KEEP_HEADER}: 1` needs `stream` to be true.", KEEP_HEADER)
    if not keep_streams:
        message = "This server keeps no streams: its option keep_streams is 0."
        raise bad_request(message, KEEP_HEADER, "unsupported_parameter")
    if num_prompts * (request.n or 1) > MAX_KEPT_CHOICES:
        raise bad_request(f"A stream that is kept may have at most {MAX_KEPT_CHOICES} choices.", KEEP_HEADER)
    return True


def check_tokenize(request: TokenizeRequest, limits: Limits) -> None:
    """Raise ApiError (400) that names the field unless /tokenize can tell what a completion's prompt would be."""
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("Send either `prompt` or `messages`.", "prompt")
    if request.messages is not None:
        check_messages(request.messages, limits)
    check_template_fields(request, limits)


def check_template_fields(request: ChatRequest | TokenizeRequest, limits: Limits) -> None:
    """Check what a chat and /tokenize say to the chat template besides messages and tools."""
    refuse_unsupported(request)
    _check_length(request.tools or (), limits.max_tools, "tools", "items")
    if request.continue_final_message:
        if request.add_generation_prompt:
            message = "`continue_final_message` needs `add_generation_prompt` to be false: no new message begins."
            raise bad_request(message, "continue_final_message")
        if request.messages and request.messages[-1].tool_calls:
            raise bad_request("A message with tool calls cannot be continued.", "continue_final_message")
        if request.messages is None:
            raise bad_request("`continue_final_message` needs `messages`.", "continue_final_message")
    if request.reasoning_effort not in (None, *EFFORTS):
        raise bad_request(f"`reasoning_effort` must be one of {', '.join(EFFORTS)}.", "reasoning_effort")


def check_sampling(request: SamplingRequest, limits: Limits) -> None:
    """Check the fields that chat and text completions share."""
    if request.best_of not in (None, request.n or 1):
        message = "`best_of` must equal `n`. Send `n` instead, and choose among the choices."
        raise bad_request(message, "best_of", "unsupported_parameter")
    if request.n is not None and request.n > limits.max_choices:
        raise bad_request(f"`n` must be from 1 to {limits.max_choices}.", "n")
    maximum = requested_max_tokens(request)
    if maximum is not None and (request.min_tokens or 0) > maximum:
        raise bad_request(f"`min_tokens` is larger than the maximum of output tokens, {maximum}.", "min_tokens")
    if maximum is not None and 0 < limits.max_requested_tokens < maximum:
        name = "max_tokens" if maximum == request.max_tokens else "max_completion_tokens"
        raise bad_request(f"`{name}` must be at most {limits.max_requested_tokens}, got {maximum}.", name)
    if isinstance(request.stop, list):
        _check_length(request.stop, limits.max_stops, "stop", "items")
    _check_length(request.logit_bias or (), limits.max_logit_bias, "logit_bias", "entries")
    _check_logit_bias(request.logit_bias, limits.vocab_size)
    priority_class(request.priority)
    if request.stream_options is not None and not request.stream:
        raise bad_request("`stream_options` needs `stream` to be true.", "stream_options")
    options = request.stream_options
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise bad_request("`continuous_usage_stats` needs `include_usage` to be true.", "stream_options")
    _check_most(request.prompt_logprobs, limits.max_logprobs, "prompt_logprobs")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("`prompt_logprobs` needs `stream` to be false.", "prompt_logprobs")
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise bad_request("`truncation_side` needs `truncate_prompt_tokens`.", "truncation_side")
    if request.allowed_token_ids is not None:
        if not request.allowed_token_ids:
            raise bad_request("`allowed_token_ids` is empty, so no token could be sampled.", "allowed_token_ids")
        check_tokens(request.allowed_token_ids, limits.vocab_size, "allowed_token_ids")
    if request.stop_token_ids:
        check_tokens(request.stop_token_ids, limits.vocab_size, "stop_token_ids")


def check_messages(messages: list[Message], limits: Limits) -> None:
    """Raise ApiError (400) unless every message has a known role and only text."""
    _check_length(messages, limits.max_messages, "messages", "items")
    for i, message in enumerate(messages):
        where = f"messages.[{i}]"
        if message.role not in ROLES:
            raise bad_request(f"`role` must be one of {', '.join(ROLES)}.", f"{where}.role")
        if message.content is UNSET and message.role != "assistant":
            raise bad_request(f"A message of role {message.role} needs `content`.", f"{where}.content")
        refuse_unsupported(message, f"{where}.")
        if isinstance(message.content, list):
            _check_parts(message.content, f"{where}.content")


def check_tokens(tokens: list[int], vocab_size: int, param: str) -> None:
    """Raise ApiError (400) unless every token id is in the vocabulary."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise bad_request(f"`{param}` must hold token ids from 0 to {vocab_size - 1}.", param)


def check_length(prompt_tokens: int, max_tokens: int | None, max_model_len: int, limits: Limits, param: str) -> None:
    """Raise ApiError (400) unless prompt and output fit the context. `max_tokens` None: at least one token."""
    if prompt_tokens == 0:
        raise bad_request(f"`{param}` has no tokens.", param)
    if limits.max_prompt_tokens and prompt_tokens > limits.max_prompt_tokens:
        raise context_length_exceeded(
            f"The prompt has {prompt_tokens} tokens; this server accepts at most {limits.max_prompt_tokens}.", param
        )
    if prompt_tokens + (1 if max_tokens is None else max_tokens) > max_model_len:
        asked = f"{prompt_tokens} in the prompt"
        asked += " and at least one for the output" if max_tokens is None else f" and {max_tokens} for the output"
        raise context_length_exceeded(
            f"This model's maximum context length is {max_model_len} tokens; you asked for {asked}.", param
        )


def split_prompts(prompt: Prompt) -> list[str | list[int]]:
    """Return the prompts of any of the four forms: a string, strings, token ids, lists of token ids."""
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
    """Return the stop strings of any form of the `stop` field."""
    return [stop] if isinstance(stop, str) else list(stop or ())


def priority_class(priority: int | str | None, default: int = 0, most_urgent: int = LOWEST) -> int:
    """Return the scheduling class of a number or a word; a lower class goes first. Raises ApiError (400).

    `most_urgent`: a more urgent class becomes this one.
    """
    if priority is None:
        return default
    if isinstance(priority, int):
        return max(priority, most_urgent)
    if priority not in PRIORITIES:
        raise bad_request(f"`priority` must be {ALLOWED}.", "priority")
    return max(PRIORITIES[priority], most_urgent)


def _check_most(value: int | None, most: int, name: str) -> None:
    if value is not None and value > most:
        raise bad_request(f"`{name}` must be from 0 to {most}, got {value}.", name)


def _check_length(values: Sized, most: int, name: str, unit: str) -> None:
    if len(values) > most:
        raise bad_request(f"`{name}` must have at most {most} {unit}.", name)


def _check_parts(parts: list[str | ContentPart], where: str) -> None:
    for j, part in enumerate(parts):
        if isinstance(part, str):
            continue
        if part.type not in (*TEXT_PARTS, "refusal"):
            message = (
                f"This model reads text only; parts of type `{part.type[:100]}` are not supported. Remove the part."
            )
            raise bad_request(message, f"{where}.[{j}]", "unsupported_parameter")
        field = "refusal" if part.type == "refusal" else "text"
        if getattr(part, field) is None:
            raise bad_request(f"A part of type {part.type} needs a `{field}`.", f"{where}.[{j}]")


def _check_logit_bias(bias: dict[str, float] | None, vocab_size: int) -> None:
    for key in bias or ():
        if not (key.isascii() and key.isdecimal() and len(key) < 16 and int(key) < vocab_size):
            raise bad_request(f"`logit_bias` keys must be token ids from 0 to {vocab_size - 1}.", "logit_bias")
