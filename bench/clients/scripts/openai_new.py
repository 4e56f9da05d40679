# requires: openai
import json

import openai
from checks import BASE, KEY, MODEL, URL, check, main
from pydantic import BaseModel

client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
SAY = [{"role": "user", "content": "Say hi."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}},
                       "required": ["city"], "additionalProperties": False},
    },
}  # fmt: skip


class City(BaseModel):
    name: str
    people: int


@check
def chat():
    answer = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=8)
    assert answer.choices[0].message.content is not None and answer.usage.completion_tokens
    assert answer._request_id


@check
def chat_stream():
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=SAY, max_tokens=8, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


@check
def chat_stream_helper():
    with client.chat.completions.stream(model=MODEL, messages=SAY, max_tokens=300) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.content
    assert "content.delta" in kinds


@check
def parts_and_developer():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hi."}]},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=8).choices


@check
def completions():
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=4, n=2, logprobs=2)
    assert len(answer.choices) == 4 and len(answer.choices[0].logprobs.tokens) == 4


@check
def echo_with_logprobs():
    answer = client.completions.create(model=MODEL, prompt="one two three", max_tokens=1, echo=True, logprobs=1)
    assert answer.choices[0].logprobs.token_logprobs[0] is None


@check
def scoring():
    answer = client.completions.create(model=MODEL, prompt="one two three", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "one two three"


@check
def chat_logprobs():
    answer = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=4, logprobs=True, top_logprobs=3)
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3


@check
def models():
    assert client.models.retrieve(client.models.list().data[0].id).id


@check
def base_url_without_v1():
    assert openai.OpenAI(base_url=URL + "/", api_key=KEY).models.list().data


@check
def azure():
    azure_client = openai.AzureOpenAI(azure_endpoint=URL, api_key=KEY, api_version="2024-10-21")
    assert azure_client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=4).choices


@check
def errors():
    for status, make in (
        (404, lambda: client.embeddings.create(model=MODEL, input="x")),
        (400, lambda: client.chat.completions.create(model=MODEL, messages=SAY, temperature=3)),
    ):
        try:
            make()
        except openai.APIStatusError as e:
            assert e.status_code == status and e.body["message"]
        else:
            raise AssertionError("no error")


@check
def json_object():
    answer = client.chat.completions.create(
        model=MODEL, messages=SAY, max_tokens=60, response_format={"type": "json_object"}
    )
    assert answer.choices[0].finish_reason == "length" or json.loads(answer.choices[0].message.content) is not None


@check
def parse_into_a_model():
    try:
        answer = client.chat.completions.parse(model=MODEL, messages=SAY, response_format=City, max_tokens=100)
    except openai.LengthFinishReasonError:
        return
    assert isinstance(answer.choices[0].message.parsed, City)


@check
def required_tool():
    answer = client.chat.completions.create(
        model=MODEL, messages=SAY, tools=[WEATHER], tool_choice="required", max_tokens=80
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and answer.choices[0].finish_reason == "tool_calls"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["city"], str)
    messages = [
        *SAY,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"degrees": 20})},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=8).choices


@check
def named_tool_stream():
    choice = {"type": "function", "function": {"name": "weather"}}
    stream = client.chat.completions.create(
        model=MODEL, messages=SAY, tools=[WEATHER], tool_choice=choice, max_tokens=80, stream=True
    )
    name, arguments = "", ""
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "weather" and json.loads(arguments)


@check
def responses():
    answer = client.responses.create(model=MODEL, input="Say hi.", max_output_tokens=16, store=False)
    assert answer.output_text is not None and answer.usage.output_tokens


@check
def responses_stream():
    with client.responses.stream(model=MODEL, input="Say hi.", max_output_tokens=16) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


main()
