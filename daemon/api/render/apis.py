"""The APIs in which an answer can be written, by the name that `AnswerForm.api` has."""

from __future__ import annotations

from typing import NamedTuple

from daemon.api.render.answer import Answer
from daemon.api.render.chat import ChatRenderer
from daemon.api.render.completion import CompletionRenderer
from daemon.api.render.messages import PING, MessagesRenderer
from daemon.api.render.renderer import Renderer
from daemon.api.render.responses import ResponsesRenderer
from daemon.api.sse import COMMENT


class Api(NamedTuple):
    """One API. `handler`: label of its route in the metrics. `param`: field with what becomes the prompt.

    `id_prefix`: of the ids of its answers. `ping`: what keeps the connection of a stream open. `shrinks`: a request
    may ask for more tokens than the context has room for, and gets as many as fit.
    """

    name: str
    handler: str
    param: str
    id_prefix: str
    renderer: type[Renderer]
    ping: bytes = COMMENT
    shrinks: bool = False


CHAT = Api("chat", "chat", "messages", "chatcmpl-", ChatRenderer)
COMPLETION = Api("completion", "completions", "prompt", "cmpl-", CompletionRenderer)
RESPONSES = Api("responses", "responses", "input", "resp_", ResponsesRenderer)
MESSAGES = Api("messages", "messages", "messages", "msg_", MessagesRenderer, PING, shrinks=True)

APIS = {api.name: api for api in (CHAT, COMPLETION, RESPONSES, MESSAGES)}
HANDLERS = frozenset(api.handler for api in APIS.values())


def renderer_of(answer: Answer) -> Renderer:
    """Return a new renderer of an answer that has all of its choices."""
    return APIS[answer.form.api].renderer(answer)
