"""What the description at /openapi.json says about each route: the types of its bodies, and what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct

from daemon.api.messages import answers as messages
from daemon.api.messages.schema import CountTokensRequest, MessagesRequest
from daemon.api.responses import answers as responses
from daemon.api.responses.schema import ResponsesRequest
from daemon.api.routes import answers
from daemon.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from daemon.api.validation import KEEP_HEADER


class Header(NamedTuple):
    """A header that a request may have. `values`: those that are accepted; empty: all texts."""

    name: str
    meaning: str
    values: tuple[str, ...] = ()


class Operation(NamedTuple):
    """One route.

    `request`, `answer`: types of its JSON bodies; None: it has no body, or another one. `events`: types of the data
    of the events of a streamed answer. `last`: what the last of them is. `text`: media type of an answer that is not
    JSON. `error`: type of the body of an error. `statuses`: of errors, besides those of every route and of every
    route with a body.
    """

    summary: str
    request: type[Struct] | None = None
    answer: type[Struct] | None = None
    events: tuple[type[Struct], ...] = ()
    last: str = "is `[DONE]`, or has a body of type ErrorAnswer"
    text: str = ""
    error: type[Struct] = answers.ErrorAnswer
    headers: Sequence[Header] = ()
    statuses: Sequence[int] = ()


_OF_COMPLETIONS = (
    Header("X-Request-Id", "An id of this request, which the answer has too."),
    Header(KEEP_HEADER, "1: the stream goes on if the connection breaks, and can be read again.", ("0", "1")),
    Header("Idempotency-Key", "Requests with the same key and body get the same answer."),
)
_READY = Operation("Does at least one engine serve?", answer=answers.Status)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "Answer a conversation",
        ChatRequest,
        answers.ChatCompletion,
        (answers.ChatCompletionChunk,),
        headers=_OF_COMPLETIONS,
    ),
    ("POST", "/v1/completions"): Operation(
        "Continue a text", CompletionRequest, answers.Completion, (answers.Completion,), headers=_OF_COMPLETIONS
    ),
    ("POST", "/v1/responses"): Operation(
        "Answer a conversation, in OpenAI's newer form",
        ResponsesRequest,
        responses.Response,
        (responses.ResponseEvent,),
        "has the whole response, or says why it failed",
        headers=_OF_COMPLETIONS,
    ),
    ("POST", "/v1/messages"): Operation(
        "Answer a conversation, in Anthropic's form",
        MessagesRequest,
        messages.AnsweredMessage,
        (messages.MessageEvent,),
        "is `message_stop`, or has a body of type MessageError",
        error=messages.MessageError,
        headers=_OF_COMPLETIONS,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Count the tokens of a conversation, in Anthropic's form",
        CountTokensRequest,
        messages.MessageTokens,
        error=messages.MessageError,
    ),
    ("GET", "/v1/models"): Operation("List the names of the model", answer=answers.ModelList),
    ("GET", "/v1/models/{model:.*[^/]}"): Operation("Describe the model", answer=answers.Model),
    ("GET", "/v1/streams/{id}"): Operation(
        "Go on with a kept stream",
        events=(
            *(answers.ChatCompletionChunk, answers.Completion),
            *(responses.ResponseEvent, messages.MessageEvent, messages.MessageError),
        ),
        last="is that of its API",
        statuses=(400, 409),
    ),
    ("DELETE", "/v1/streams/{id}"): Operation("Cancel a kept stream", answer=answers.StreamDeleted),
    ("POST", "/tokenize"): Operation("Turn text or messages into tokens", TokenizeRequest, answers.Tokens),
    ("POST", "/detokenize"): Operation("Turn tokens into text", DetokenizeRequest, answers.Text),
    ("GET", "/health"): Operation("Does this process live?", answer=answers.Status),
    ("GET", "/health/ready"): _READY,
    ("GET", "/ping"): _READY,
    ("POST", "/ping"): _READY,
    ("GET", "/version"): Operation("Name the version of this server", answer=answers.Version),
    ("GET", "/load"): Operation("Count the requests that the engines have", answer=answers.Load),
    ("GET", "/metrics"): Operation("Give all metrics as Prometheus text", text="text/plain"),
    ("GET", "/openapi.json"): Operation("Give this description", answer=answers.Description),
}
