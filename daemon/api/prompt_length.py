"""Refuse a text that is too long for a prompt before it is tokenised as a whole. Pure."""

from __future__ import annotations

from daemon.api.errors import ApiError, context_length_exceeded
from daemon.models.tokenizer import Tokenizer

_PIECE = 32 << 10  # characters that are tokenised at a time to estimate a length
_CUT = 32  # tokens by which a cut through a text may raise their number; in practice it is one or two
_USUAL = 4  # bytes of UTF-8 in a token: a text of more than so many for each allowed token is looked at first


def check_text_length(text: str, tokenizer: Tokenizer, limit: int, param: str) -> None:
    """Raise ApiError (400) if `text` certainly has more than `limit` tokens.

    The number of characters decides alone where it can. Otherwise pieces of a long text are tokenised until they have
    too many tokens: tokenising a text of 8 MB that is refused would cost seconds of processor time, and freeing the
    result holds the interpreter's lock.
    """
    longest = tokenizer.max_token_chars
    if longest and len(text) > limit * longest:
        raise _too_long(-(-len(text) // longest), limit, param)
    if len(text) <= _PIECE or len(text.encode("utf-8", "replace")) <= limit * _USUAL:
        return
    least = 0
    for start in range(0, len(text), _PIECE):
        least += tokenizer.count(text[start : start + _PIECE]) - _CUT
        if least > limit:
            raise _too_long(least, limit, param)


def _too_long(least: int, limit: int, param: str) -> ApiError:
    message = f"The text has more than {least} tokens; at most {limit} are allowed here."
    return context_length_exceeded(message, param)
