"""From the text of a prompt to its tokens, within the limits of the server and as its request asks."""

from __future__ import annotations

from typing import NamedTuple

from daemon.api.params import truncated
from daemon.api.prompt_length import check_text_length
from daemon.api.schemas import SamplingRequest
from daemon.api.service import Service
from daemon.models.tokenizer import Tokenizer

MAX_TEXT = 1 << 17  # tokens of a text of which a request keeps a part, if the model's context is not longer


class PromptEncoder(NamedTuple):
    """Encodes the prompts of one request, in any thread. `limit`: tokens of a text; `context`: of the model."""

    tokenizer: Tokenizer
    request: SamplingRequest
    param: str
    limit: int
    context: int

    @classmethod
    def of(cls, service: Service, request: SamplingRequest, param: str) -> PromptEncoder:
        """`param`: the field that errors name."""
        context = service.max_model_len
        limit = service.max_prompt_len if request.truncate_prompt_tokens is None else max(context, MAX_TEXT)
        return cls(service.tokenizer, request, param, limit, context)

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text. `special`: with those that the tokenizer adds. Raises ApiError (400)."""
        check_text_length(text, self.tokenizer, self.limit, self.param)
        return self.cut(self.tokenizer.encode(text, special))

    def cut(self, tokens: list[int]) -> list[int]:
        """Return what the request keeps of a prompt."""
        return truncated(tokens, self.request, self.context)
