"""What an answer says of its prompt besides its text: the ids of its tokens, and their logprobs.

The journal has both until the answer is delivered. They become JSON piece by piece, and the event loop runs in
between: a prompt may have a million tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec

from daemon.api.generator import TokenStream
from daemon.api.logprobs import JsonList, TextLogprobs, TokenTexts
from daemon.ipc.messages import TokenLogprobs
from daemon.ipc.prompt_logprobs import PromptLogprob
from daemon.models.tokenizer import Tokenizer

_PIECE = 256  # tokens whose logprobs become JSON at a time
_WORK = 1 << 16  # the same of ids, which take less


class PromptDetails(NamedTuple):
    """JSON for the members `prompt_token_ids` and `prompt_logprobs`; None: the request does not ask for it."""

    token_ids: msgspec.Raw | None = None
    logprobs: msgspec.Raw | None = None


NO_DETAILS = PromptDetails()


async def prompt_details(stream: TokenStream, texts: TokenTexts, *, ids: bool, logprobs: int) -> PromptDetails:
    """Return the details of a prompt. `logprobs`: as in `SamplingParams`. Raises EngineLost if these are lost."""
    tokens = stream.prompt()
    return PromptDetails(
        await _token_ids(tokens) if ids else None,
        await _logprobs(stream, tokens, texts, logprobs) if logprobs >= 0 else None,
    )


async def add_echo(stream: TokenStream, into: TextLogprobs, tokenizer: Tokenizer, top: int) -> None:
    """Add the tokens of the prompt to the logprobs of a completion that repeats it. Raises EngineLost."""
    tokens, shown = stream.prompt(), tokenizer.detokenizer()
    into.add_prompt(tokens[:1], [None], shown)
    async for start, found in _pieces(stream, len(tokens)):
        entries = [TokenLogprobs(p.logprob, p.top_ids[:top], p.top_logprobs[:top]) for p in found]
        into.add_prompt(tokens[start : start + len(found)], entries, shown)


async def _pieces(stream: TokenStream, length: int) -> AsyncIterator[tuple[int, list[PromptLogprob]]]:
    """Yield the index of the first token of each piece, and the logprobs of its tokens."""
    for start in range(1, length, _PIECE):
        yield start, stream.prompt_logprobs(start, min(start + _PIECE, length))
        await asyncio.sleep(0)


async def _token_ids(tokens: list[int]) -> msgspec.Raw:
    found = JsonList()
    for start in range(0, len(tokens), _WORK):
        found.extend(tokens[start : start + _WORK])
        await asyncio.sleep(0)
    return msgspec.Raw(found.take())


async def _logprobs(stream: TokenStream, tokens: list[int], texts: TokenTexts, top: int) -> msgspec.Raw:
    """Return vLLM's list: null for the first token, then an object with an entry for each token by its id."""
    items = JsonList()
    items.extend([None])
    async for start, found in _pieces(stream, len(tokens)):
        items.extend([_entries(tokens[start + i], entry, texts, top) for i, entry in enumerate(found)])
    return msgspec.Raw(items.take())


def _entries(token: int, found: PromptLogprob, texts: TokenTexts, top: int) -> dict[str, dict[str, Any]]:
    """Return the token of the prompt, and then its alternatives."""
    entries = {str(token): _entry(token, found.logprob, found.rank, texts)}
    pairs = zip(found.top_ids[:top], found.top_logprobs[:top], strict=True)
    for rank, (other, logprob) in enumerate(pairs, 1):
        if other != token:
            entries[str(other)] = _entry(other, logprob, rank, texts)
    return entries


def _entry(token: int, logprob: float, rank: int, texts: TokenTexts) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": texts.token_text(token)}
