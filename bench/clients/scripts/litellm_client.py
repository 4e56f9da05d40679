# requires: litellm
import json

import litellm
from checks import BASE, KEY, MODEL, check, main

SAY = [{"role": "user", "content": "Say hi."}]
OPENAI = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY, "max_tokens": 60}
VLLM = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE, "api_key": KEY, "max_tokens": 60}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@check
def chat():
    for where in (OPENAI, VLLM):
        answer = litellm.completion(messages=SAY, **where)
        assert answer.choices[0].message.content is not None and answer.usage.completion_tokens


@check
def stream():
    for where in (OPENAI, VLLM):
        options = {"include_usage": True}
        chunks = list(litellm.completion(messages=SAY, stream=True, stream_options=options, **where))
        assert chunks[-1].usage.completion_tokens


@check
def text():
    answer = litellm.text_completion(
        prompt="a", max_tokens=4, model=f"text-completion-openai/{MODEL}", api_base=BASE, api_key=KEY
    )
    assert answer.choices[0].text is not None


@check
def tools():
    answer = litellm.completion(messages=SAY, tools=[TOOL], tool_choice="required", **VLLM)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) is not None


@check
def json_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    answer = litellm.completion(
        messages=SAY,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        **VLLM,
    )
    assert answer.choices[0].finish_reason == "length" or "a" in json.loads(answer.choices[0].message.content)


@check
def responses():
    assert litellm.responses(
        input="Say hi.", max_output_tokens=16, **{k: v for k, v in OPENAI.items() if k != "max_tokens"}
    ).output


@check
def azure():
    answer = litellm.completion(
        model=f"azure/{MODEL}", api_base=BASE.removesuffix("/v1"), api_key=KEY, api_version="2024-10-21",
        messages=SAY, max_tokens=8,
    )  # fmt: skip
    assert answer.choices


main()
