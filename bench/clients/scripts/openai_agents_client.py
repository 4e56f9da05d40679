# requires: openai-agents
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from checks import BASE, KEY, MODEL, check, main
from openai import AsyncOpenAI

set_tracing_disabled(True)
LIMITS = ModelSettings(max_tokens=60)


@function_tool
def get_weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"It is 12 degrees in {city}."


def agent(*tools):
    client = AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0)
    model = OpenAIResponsesModel(model=MODEL, openai_client=client)
    return Agent(name="agent", instructions="Be brief.", model=model, tools=list(tools), model_settings=LIMITS)


@check
async def text():
    assert isinstance((await Runner.run(agent(), "Say hi.")).final_output, str)


@check
async def two_turns():
    first = await Runner.run(agent(), "Say hi.")
    items = [*first.to_input_list(), {"role": "user", "content": "Once more."}]
    assert len((await Runner.run(agent(), items)).raw_responses) == 1


@check
async def stream():
    run = Runner.run_streamed(agent(get_weather), "How is the weather in Paris?", max_turns=2)
    kinds = [e.data.type async for e in run.stream_events() if e.type == "raw_response_event"]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


main()
