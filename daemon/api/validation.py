"""Checks of a decoded request that its schema cannot express: relations between fields, and bounds that depend on the
configuration or the model. Every check is cheap and pure, and runs before the prompt is tokenised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from daemon.api.errors import ApiError, bad_request, context_length_exceeded
from daemon.api.schemas import ChatRequest, CompletionRequest, ContentPart, Message, Prompt, SamplingRequest
from daemon.control.policy.priority import ALLOWED, PRIORITIES

ROLES = ("system", "developer", "user", "assistant", "tool")

# Values that are harmless besides null, false and empty, by refused field.
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
    max_prompt_tokens: int  # 0: no limit besides the model's context length
    max_output_tokens: int  # of a choice whose request sets no maximum


def check_chat(request: ChatRequest, limits: Limits) -> None:
    """Raise ApiError (400) that names the field if the request cannot be served."""
    tools_off = request.tool_choice == "none"
    for name in _REFUSED_CHAT:
        if not (tools_off and name == "tools"):
            _refuse(request, name)
    check_sampling(request, limits)
    check_messages(request.messages)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")


def check_completion(request: CompletionRequest, limits: Limits) -> None:
    """Raise ApiError (400) that names the field if the request cannot be served."""
    _refuse(request, "suffix")
    check_sampling(request, limits)
    if request.echo and request.logprobs is not None:
        raise bad_request("`echo` together with `logprobs` is not supported.", "echo")
    prompts = split_prompts(request.prompt)
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_tokens(prompt, limits.vocab_size, "prompt")
    n = request.n or 1
    if len(prompts) * n > limits.max_queued:
        message = f"`prompt` has {len(prompts)} prompts; times n={n} this is more than {limits.max_queued} choices."
        raise bad_request(message, "prompt")


def check_sampling(request: SamplingRequest, limits: Limits) -> None:
    """Check the fields that chat and text completions share."""
    for name in _REFUSED:
        _refuse(request, name)
    if request.best_of not in (None, request.n or 1):
        raise _unsupported("best_of")
    if request.n is not None and request.n > limits.max_choices:
        raise bad_request(f"`n` must be from 1 to {limits.max_choices}.", "n")
    if request.min_tokens and request.max_tokens and request.min_tokens > request.max_tokens:
        raise bad_request("`min_tokens` is larger than `max_tokens`.", "min_tokens")
    _check_logit_bias(request.logit_bias, limits.vocab_size)
    priority_class(request.priority)
    if request.stream_options is not None and not request.stream:
        raise bad_request("`stream_options` needs `stream` to be true.", "stream_options")
    if request.stop_token_ids:
        check_tokens(request.stop_token_ids, limits.vocab_size, "stop_token_ids")


def check_messages(messages: list[Message]) -> None:
    """Raise ApiError (400) unless every message has a known role and only text."""
    for i, message in enumerate(messages):
        where = f"messages.[{i}]"
        if message.role not in ROLES:
            raise bad_request(f"`role` must be one of {', '.join(ROLES)}.", f"{where}.role")
        if message.content is None and message.role != "assistant":
            raise bad_request(f"A message of role {message.role} needs `content`.", f"{where}.content")
        if isinstance(message.content, list):
            _check_parts(message.content, f"{where}.content")


def check_tokens(tokens: list[int], vocab_size: int, param: str) -> None:
    """Raise ApiError (400) unless every token id is in the vocabulary."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise bad_request(f"`{param}` must hold token ids from 0 to {vocab_size - 1}.", param)


def check_length(prompt_tokens: int, max_tokens: int, max_model_len: int, limits: Limits, param: str) -> None:
    """Raise ApiError (400) unless prompt and output fit the context. `max_tokens` 0: the request sets no maximum."""
    if prompt_tokens == 0:
        raise bad_request(f"`{param}` has no tokens.", param)
    if limits.max_prompt_tokens and prompt_tokens > limits.max_prompt_tokens:
        raise context_length_exceeded(
            f"The prompt has {prompt_tokens} tokens; this server accepts at most {limits.max_prompt_tokens}.", param
        )
    if prompt_tokens + max(max_tokens, 1) > max_model_len:
        asked = f"{prompt_tokens} in the prompt"
        asked += f" and {max_tokens} for the output" if max_tokens else " and at least one for the output"
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


def priority_class(priority: int | str | None, default: int = 0) -> int:
    """Return the scheduling class of a number or a word; a lower class goes first. Raises ApiError (400)."""
    if priority is None:
        return default
    if isinstance(priority, int):
        return priority
    if priority not in PRIORITIES:
        raise bad_request(f"`priority` must be {ALLOWED}.", "priority")
    return PRIORITIES[priority]


def _check_parts(parts: list[ContentPart], where: str) -> None:
    for j, part in enumerate(parts):
        if part.type != "text" or part.text is None:
            raise bad_request("Only parts of type text, with a `text`, are supported.", f"{where}.[{j}]")


def _check_logit_bias(bias: dict[str, float] | None, vocab_size: int) -> None:
    for key in bias or ():
        if not (key.isascii() and key.isdecimal() and len(key) < 16 and int(key) < vocab_size):
            raise bad_request(f"`logit_bias` keys must be token ids from 0 to {vocab_size - 1}.", "logit_bias")


def _refuse(request: object, name: str) -> None:
    """Raise ApiError (400) unless the field has a neutral value."""
    value = getattr(request, name)
    # `in` compares with `==` on purpose: 0, 0.0, false, "", [] and {} ask for nothing.
    if value is None or value in (False, "", [], {}) or (name in _HARMLESS and _HARMLESS[name](value)):
        return
    raise _unsupported(name)


def _unsupported(name: str) -> ApiError:
    return bad_request(f"`{name}` with this value is not supported.", name, "unsupported_parameter")
