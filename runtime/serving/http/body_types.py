"""What the fields of request bodies are made of: texts, numbers, lists, and `Body`, the base of all bodies.

Leniency has its place here, before a body is validated: null is an absent field, 1.0 is 1. What becomes of
names that a body does not carry out, fields.py knows. Knows no route. Start at `Body`.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from runtime.serving.http import fields


def integral(value: Any) -> Any:
    """Return 1 for 1.0: clients whose language has one kind of number send it."""
    return int(value) if type(value) is float and value.is_integer() else value


def _integral_items(value: Any) -> Any:
    """Return a list with the floats that are integral as integers."""
    if type(value) is list and float in set(map(type, value)):
        return [integral(item) for item in value]
    return value


def _at_most(entries: int) -> Callable[[Any], Any]:
    """Return a check of an object's size that comes before the check of its entries."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError(
                "too_many", "has {found} entries, at most {most}", {"found": len(value), "most": entries}
            )
        return value

    return check


def by_kind(expected: str, tags: Mapping[type, str], of_type: Mapping[str, str] = {}) -> Discriminator:
    """Return what chooses a branch of a union by the JSON kind of a value: one error, of that branch.

    Tags stand in brackets (`<text>`): they are no part of the path that an error is shown with. Those
    `of_type` are of objects whose `type` is so.
    """

    def tag(value: Any) -> str | None:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        if isinstance(kind, str) and kind in of_type:
            return of_type[kind]
        return tags.get(dict if isinstance(value, BaseModel) else type(value))

    return Discriminator(tag, custom_error_type="kind", custom_error_message=f"must be {expected}")


MAX_BIASES = 1024
MAX_PROMPT_IDS = 2**20
"""Token ids in one list: more than any context that is served."""

Text = str
ShortText = Annotated[str, Field(max_length=256)]
Name = Annotated[str, Field(max_length=256)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Integer = Annotated[int, Field(strict=True), BeforeValidator(integral)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenCount = Annotated[Integer, Field(ge=1, lt=2**31)]
TopK = Annotated[Integer, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(k, 0))]
TokenIds = Annotated[
    list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True), BeforeValidator(_integral_items)
]
Biases = Annotated[
    dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[Number, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_at_most(MAX_BIASES)),
]
Metadata = Annotated[
    dict[Name, Annotated[str, Field(max_length=4096)]], Field(max_length=16), BeforeValidator(_at_most(16))
]


class Body(BaseModel):
    """Base of all request bodies and of the objects within them.

    A field that is null is absent, where it may be absent. A name that is not known here is looked up in
    `treatments`, and is counted in the validation's context where that does not know it either.
    """

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        populate_by_name=True,
    )
    treatments: ClassVar[fields.Treatments] = {}
    """What becomes of names that clients send and that are no field of this body."""

    @model_validator(mode="before")
    @classmethod
    def _tidied(cls, sent: Any, info: ValidationInfo) -> Any:
        if type(sent) is not dict:
            return sent
        names = _names(cls)
        if sent.keys() <= names.keys() and None not in sent.values():
            return sent
        kept = {}
        for name, value in sent.items():
            if (required := names.get(name)) is None:
                _treat(cls, name, value, info.context)
            elif value is not None or required:
                kept[name] = value
        return kept

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the body's description: every field that may be absent may be null."""
        described = handler(schema)
        resolved = handler.resolve_ref_schema(described)
        required = resolved.get("required", ())
        for name, one in resolved.get("properties", {}).items():
            if name not in required and {"type": "null"} not in one.get("anyOf", ()):
                resolved["properties"][name] = _or_null(one)
        return described


def _or_null(described: dict[str, Any]) -> dict[str, Any]:
    """Return the description of one field with null added to what it takes."""
    about: dict[str, Any] = {
        key: described[key] for key in ("title", "description", "default") if key in described
    }
    rest = {key: value for key, value in described.items() if key not in about}
    if not rest:
        return described
    return {"anyOf": [rest, {"type": "null"}], **about}


@cache
def _names(body: type[Body]) -> dict[str, bool]:
    """Return the names by which a body's fields are sent, and whether each is required."""
    names = {name: field.is_required() for name, field in body.model_fields.items()}
    return names | {field.alias: field.is_required() for field in body.model_fields.values() if field.alias}


@cache
def _meaningful(body: type[Body]) -> tuple[str, ...]:
    """Return the names that a misspelt name may have been meant for."""
    return (*_names(body), *fields.refused(body.treatments))


def _treat(body: type[Body], name: str, value: Any, unknown: Any) -> None:
    """Ignore a name, count it in `unknown`, or refuse it."""
    treatment = body.treatments.get(name)
    if treatment is None:
        if isinstance(unknown, fields.UnknownFields) and not unknown.add(name):
            raise PydanticCustomError(
                "too_many",
                "has more than {most} fields that are not known; leave them out",
                {"most": fields.MOST_UNKNOWN},
            )
        meant = fields.near_miss(name, _meaningful(body))
        if meant in _names(body):
            raise PydanticCustomError(
                "near_miss",
                "'{field}' is not known; did you mean '{meant}'?",
                {"field": name, "meant": meant},
            )
        treatment = body.treatments.get(meant or "")
    if treatment is not None and treatment.refuses(value):
        raise PydanticCustomError(
            "refused", "'{field}' is not supported here: {why}", {"field": name, "why": treatment.why}
        )
