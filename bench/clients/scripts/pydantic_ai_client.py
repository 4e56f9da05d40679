# requires: pydantic-ai-slim[openai]
from checks import BASE, KEY, MODEL, check, main
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE, api_key=KEY)
model = OpenAIChatModel(MODEL, provider=provider)
LIMITS = {"max_tokens": 100}


class City(BaseModel):
    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=999)


@check
def text():
    assert Agent(model).run_sync("Say hi.", model_settings=LIMITS).output is not None


@check
async def stream():
    async with Agent(model).run_stream("Say hi.", model_settings=LIMITS) as result:
        assert [piece async for piece in result.stream_text()]


@check
def output_by_tool():
    assert isinstance(Agent(model, output_type=City).run_sync("Name a city.", model_settings=LIMITS).output, City)


@check
def output_by_schema():
    agent = Agent(model, output_type=NativeOutput(City))
    assert isinstance(agent.run_sync("Name a city.", model_settings=LIMITS).output, City)


@check
def responses():
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider))
    assert agent.run_sync("Say hi.", model_settings=LIMITS).output is not None


main()
