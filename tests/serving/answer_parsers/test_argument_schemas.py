"""Arguments whose schemas share one large part cost no more than the body that states them."""

from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.serving.answer_parsers.argument_schemas import MOST_OPTIONS, ArgumentSchemas
from runtime.serving.answer_parsers.formats import CALLS
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.grammars import ForcedCalls, spelled
from runtime.serving.engine.protocol import Constraint
from tests.costs import assert_linear

CODER = AnswerForm(calls=CALLS["qwen3_coder"])


def sharing(definitions: dict[str, Any], references: list[str]) -> dict[str, Any]:
    """Return the schema of one argument for each of the `references`."""
    properties = {f"a{number}": {"$ref": f"#/$defs/{name}"} for number, name in enumerate(references)}
    return {"type": "object", "$defs": definitions, "properties": properties}


def one_list(size: int) -> dict[str, Any]:
    return sharing({"e": {"enum": [f"v{number}" for number in range(size)]}}, ["e"] * size)


def one_union(size: int) -> dict[str, Any]:
    return sharing({"e": {"anyOf": [{"const": f"v{number}"} for number in range(size)]}}, ["e"] * size)


def one_chain(size: int) -> dict[str, Any]:
    links = {f"e{at}": {"type": "string", "$ref": f"#/$defs/e{at + 1}"} for at in range(size)}
    return sharing(links, [*links])


def forced(*schemas: dict[str, Any]) -> Constraint | None:
    tools = {f"f{number}": schema for number, schema in enumerate(schemas)}
    return spelled(CODER, None, ForcedCalls(tools, "tool_choice"), prompt="", special={})


def test_a_grammar_has_a_list_that_many_arguments_share_once() -> None:
    made = forced(one_list(40))
    assert made is not None
    assert made.value["top"].count('"v39"') == 1
    assert_linear(lambda size: forced(one_list(size)), 100, 1600)


@pytest.mark.parametrize("made", [one_union, one_chain])
def test_arguments_of_too_many_schemas_are_refused_before_the_grammar_grows(made: Any) -> None:
    assert forced(made(50)) is not None
    with pytest.raises(RequestError, match=f"'tool_choice': .* more than {MOST_OPTIONS} schemas") as refused:
        forced(made(1600))
    assert refused.value.param == "tool_choice"
    with pytest.raises(RequestError, match="schemas"):  # counted over all functions
        forced(*(made(100) for _ in range(50)))


@pytest.mark.parametrize("made", [one_list, one_union, one_chain])
def test_values_of_an_answer_are_typed_at_a_bounded_cost(made: Any) -> None:
    def typed(size: int) -> ArgumentSchemas:
        schema = made(size)
        schemas = ArgumentSchemas(schema)
        for argument in schema["properties"].values():
            assert schemas.typed("12", argument) in {"12", 12}
        return schemas

    assert_linear(typed, 400, 6400)


def test_circles_of_references_end() -> None:
    schema = sharing(
        {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, ["a"]
    )
    assert ArgumentSchemas(schema).kinds(schema["properties"]["a0"]) == {"null"}
