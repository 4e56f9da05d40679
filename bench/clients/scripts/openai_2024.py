# requires: openai==1.12.0 httpx<0.28
import openai
from checks import BASE, KEY, MODEL, URL, check, main

client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
SAY = [{"role": "user", "content": "Say hi."}]


@check
def chat():
    assert client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=8).choices[0].message.role


@check
def chat_stream():
    chunks = list(client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=8, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@check
def completions():
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=4, logprobs=1).choices[0].logprobs.tokens


@check
def tools():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = client.chat.completions.create(
        model=MODEL, messages=SAY, tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}},
        max_tokens=40,
    )  # fmt: skip
    assert answer.choices[0].message.tool_calls[0].function.name == "f"


@check
def models():
    assert client.models.list().data


@check
def azure():
    azure_client = openai.AzureOpenAI(azure_endpoint=URL, api_key=KEY, api_version="2023-12-01-preview")
    assert azure_client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=4).choices


main()
