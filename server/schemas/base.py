"""What every body of a request is: a JSON object, parsed strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def _only(one: bool) -> BeforeValidator:
    """Takes one of true and false: to a `Literal`, 1 and 0 are these, too."""

    def check(value: object) -> bool:
        if value is not one:
            message = "Input should be true" if one else "Input should be false"
            raise PydanticCustomError("literal_error", message)
        return one

    return BeforeValidator(check)


OnlyFalse = Annotated[Literal[False], _only(False)]
OnlyTrue = Annotated[Literal[True], _only(True)]


def _describe_nulls(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that `RequestBody` accepts null for optional and unknown fields."""
    required = schema.get("required", ())
    for name, kind in schema["properties"].items():
        if name not in required and {"type": "null"} not in kind.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [kind, {"type": "null"}]}
            for key in ("default", "description", "title"):
                if key in kind:
                    schema["properties"][name][key] = kind.pop(key)
        if isinstance(schema["properties"][name].get("default"), dict):
            # Generators of clients fail at objects for defaults; it is the object that asks for
            # nothing.
            del schema["properties"][name]["default"]
    schema["additionalProperties"] = {"type": "null"}


class RequestBody(BaseModel):
    """A JSON object whose nulls mean 'not given' and whose unknown fields are refused."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        json_schema_extra=_describe_nulls,
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Drop nulls, and all unknown fields but the first: an error names one."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = given.keys() - known
        if len(unknown) > 1:
            first = next(name for name in given if name in unknown)
            return {n: v for n, v in given.items() if n not in unknown or n == first}
        return given
