"""What a successor must know of a response to go on with it, apart from its bytes, its state and its journal.

The state of a response in the outbox is one word for the answer, then one for each choice. See `daemon.ipc.outbox`.
"""

from __future__ import annotations

import msgspec

from daemon.api.params import num_logprobs
from daemon.api.parse.formats import Parsing
from daemon.api.request_identity import Identity
from daemon.api.schemas import ChatRequest, CompletionRequest
from daemon.api.validation import stop_strings
from daemon.ipc.messages import Finish
from daemon.models.model_config import ModelConfig

ENDED = 1  # bit of the answer's word: the last byte of the response is committed
USAGE_SENT = 2  # bit of the same: the event with the usage is sent
_BEGUN = 16  # bit of a choice's word: the events before its first output are committed
_FINISH = 15  # mask of its finish, NONE if its end is not committed
_POSITION = 8  # shift of its position: output tokens that are committed, with those after a stop string


EVENTS = 8  # shift in the same: number of events that are sent, of an API whose events are numbered


class AnswerForm(msgspec.Struct, array_like=True, frozen=True):
    """How an answer is written: everything in its request that decides which bytes a token becomes.

    `api` names the renderer. `parsing`: None if all text is plain. `extra`: what only this renderer can read.
    `show_stop`: a stop string, or the token that ends the output, is part of the text. `ids`: the answer has the ids
    of all tokens. `prompt_logprobs`: that it has, as in `SamplingParams`. `echo_logprobs`: those of the prompt come
    before those of the output.
    """

    api: str
    stream: bool
    n: int
    stops: tuple[str, ...]
    min_tokens: int
    end_tokens: frozenset[int]  # tokens that end the output and are not part of its text
    skip_special: bool
    logprobs: int  # as `SamplingParams.logprobs`
    token_ids: bool  # name tokens by their ids
    include_usage: bool
    continuous_usage: bool
    parsing: Parsing | None = None
    extra: bytes = b""
    show_stop: bool = False
    ids: bool = False
    prompt_logprobs: int = -1
    echo_logprobs: bool = False

    @property
    def describes_prompt(self) -> bool:
        """True if the answer has more of its prompt than the text."""
        return self.ids or self.echo_logprobs or self.prompt_logprobs >= 0


class PromptFacts(msgspec.Struct, array_like=True, frozen=True):
    num_tokens: int
    echo: str  # the text that each of its answers begins with
    thinking: bool = False  # the prompt ends with the marker that begins reasoning


class ResponseFacts(msgspec.Struct, array_like=True, frozen=True):
    """Facts about one response. Times are seconds: `created` of the epoch, `arrival` of CLOCK_MONOTONIC.

    `slots` and `rids`: of the choices in the journal. `minor`: of the HTTP version. `head_sent`: the head of the
    response is not in the outbox, because the client got it before. `headers`: those that all responses have.
    `keep`: its answer is kept, and `owner` may read it again. `after`: the id of the event after which it began.
    `identity`: of the requests that get the same answer.
    """

    id: str
    created: int
    arrival: float
    form: AnswerForm
    prompts: list[PromptFacts]
    slots: list[int]
    rids: list[int]
    minor: int
    head_sent: bool
    headers: dict[str, str]
    client: str
    method: str
    path: str
    request_id: str
    keep: bool = False
    owner: str = ""
    after: str = ""
    identity: Identity | None = None


encode_facts = msgspec.msgpack.Encoder().encode
decode_facts = msgspec.msgpack.Decoder(ResponseFacts).decode


def answer_form(
    request: ChatRequest | CompletionRequest,
    model_config: ModelConfig,
    *,
    api: str,
    parsing: Parsing | None = None,
    extra: bytes = b"",
) -> AnswerForm:
    """Return the form of the answer to a checked request."""
    options = request.stream_options
    eos = () if request.ignore_eos else model_config.eos_token_ids
    return AnswerForm(
        api=api,
        stream=bool(request.stream),
        n=request.n or 1,
        stops=tuple(stop_strings(request.stop)),
        min_tokens=request.min_tokens or 0,
        end_tokens=frozenset((*eos, *(request.stop_token_ids or ()))),
        skip_special=request.skip_special_tokens is not False,
        logprobs=num_logprobs(request),
        token_ids=bool(request.return_tokens_as_token_ids),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        parsing=parsing,
        extra=extra,
        show_stop=bool(request.include_stop_str_in_output),
        ids=bool(request.return_token_ids),
        prompt_logprobs=-1 if request.prompt_logprobs is None else request.prompt_logprobs,
        echo_logprobs=isinstance(request, CompletionRequest) and bool(request.echo) and request.logprobs is not None,
    )


def choice_word(position: int, finish: Finish) -> int:
    """Return the word of a choice that has begun."""
    return position << _POSITION | _BEGUN | finish


class ChoicePosition(msgspec.Struct, frozen=True):
    """The word of a choice, read."""

    position: int
    begun: bool
    finish: Finish


def choice_position(word: int) -> ChoicePosition:
    return ChoicePosition(word >> _POSITION, bool(word & _BEGUN), Finish(word & _FINISH))
