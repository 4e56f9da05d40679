# requires: instructor
import instructor
import openai
from checks import BASE, KEY, MODEL, check, main
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=999)


def extract(mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=BASE, api_key=KEY), mode=mode)
    found = client.chat.completions.create(
        model=MODEL, response_model=City, max_retries=0, max_tokens=100,
        messages=[{"role": "user", "content": "Rome has 3 people."}],
    )  # fmt: skip
    assert isinstance(found, City)


@check
def by_tool():
    extract(instructor.Mode.TOOLS)


@check
def by_json_schema():
    extract(instructor.Mode.JSON_SCHEMA)


main()
