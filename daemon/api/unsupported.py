"""Fields of other servers that this one knows only to refuse them, because their value would change the answer.

A schema declares such a field as ``Annotated[Any, unsupported(...)]``. Its neutral values are accepted: they ask for
nothing. docs/fields.md lists them all.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from typing import Any, NamedTuple

from msgspec import Meta, Struct, inspect

from daemon.api.errors import bad_request

NEUTRAL: tuple[Any, ...] = (
    None,
    False,
    "",
    [],
    {},
)  # not 0: `thinking_token_budget: 0` asks for something


class Rule(NamedTuple):
    """`advice`: a sentence that says what to do instead. `neutral`: accepted values besides NEUTRAL."""

    advice: str
    neutral: tuple[Any, ...]

    def accepts(self, value: Any) -> bool:
        """Return True if the value asks for nothing. A boolean is no number here, although Python says so."""
        return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in (*NEUTRAL, *self.neutral))


def unsupported(advice: str, *neutral: Any) -> Meta:
    """Return the annotation of a refused field."""
    accepted = {"enum": [*NEUTRAL, *neutral]}
    return Meta(
        extra={"rule": Rule(advice, neutral)}, description=f"Not supported. {advice}", extra_json_schema=accepted
    )


@cache
def rules(schema: type[Struct]) -> dict[str, Rule]:
    """Return the rules of the refused fields of a schema, by name."""
    info = inspect.type_info(schema)
    assert isinstance(info, inspect.StructType)
    extras = {f.encode_name: f.type.extra or {} for f in info.fields if isinstance(f.type, inspect.Metadata)}
    return {name: extra["rule"] for name, extra in extras.items() if "rule" in extra}


def refuse_unsupported(request: Struct, where: str = "", besides: Container[str] = ()) -> None:
    """Raise ApiError (400) if a refused field, but those in `besides`, has a value that is not neutral.

    `where` is the path of the object in the body, with a dot at its end, or "".
    """
    for name, rule in rules(type(request)).items():
        value = getattr(request, name)
        if value is not None and name not in besides and not rule.accepts(value):
            message = f"`{name}` with this value is not supported. {rule.advice}"
            raise bad_request(message, where + name, "unsupported_parameter")
