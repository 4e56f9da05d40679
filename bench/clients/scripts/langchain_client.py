# requires: langchain-openai
from checks import BASE, KEY, MODEL, check, main
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

chat_model = ChatOpenAI(
    base_url=BASE, api_key=KEY, model=MODEL, max_tokens=80, max_retries=0, timeout=120, stream_usage=True
)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=999)


@tool
def weather(city: str) -> str:
    """Weather of a city."""
    return "sunny in " + city


@check
def chat():
    assert chat_model.invoke([SystemMessage("Be brief."), HumanMessage("Say hi.")]).content is not None


@check
def stream():
    whole = None
    for chunk in chat_model.stream("Say hi."):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["output_tokens"]


@check
def completions():
    assert OpenAI(base_url=BASE, api_key=KEY, model=MODEL, max_tokens=4).invoke("a") is not None


@check
def logprobs():
    answer = chat_model.bind(logprobs=True, top_logprobs=2).invoke("Say hi.")
    assert answer.response_metadata["logprobs"]["content"]


@check
def bind_tools():
    answer = chat_model.bind_tools([weather], tool_choice="weather").invoke("Weather in Rome?")
    assert answer.tool_calls[0]["name"] == "weather"
    messages = [HumanMessage("Weather in Rome?"), answer, ToolMessage("20", tool_call_id=answer.tool_calls[0]["id"])]
    assert isinstance(chat_model.bind_tools([weather]).invoke(messages), AIMessage)


@check
def structured_by_schema():
    found = chat_model.with_structured_output(City, method="json_schema").invoke("Name a city.")
    assert isinstance(found, City)


@check
def structured_by_tool():
    found = chat_model.with_structured_output(City, method="function_calling").invoke("Name a city.")
    assert isinstance(found, City)


@check
def responses():
    model = ChatOpenAI(base_url=BASE, api_key=KEY, model=MODEL, max_tokens=16, use_responses_api=True, store=False)
    assert model.invoke("Say hi.").content is not None


main()
