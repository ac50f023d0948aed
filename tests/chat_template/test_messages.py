"""Messages as a template takes them: ids, results, thoughts and arguments, and never what is None."""

import pytest

from runtime.chat_template import TemplateFeatures
from runtime.chat_template.features import NINE, Turn, call
from runtime.chat_template.messages import prepared

NINES = TemplateFeatures(call_ids="nine")


def result(call_id: str | None, content: str = "r") -> Turn:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def asked(*ids: str) -> Turn:
    return {"role": "assistant", "content": "", "tool_calls": [call(each, "f", {}) for each in ids]}


def test_ids_of_other_models_are_nine_characters_and_still_tie_results_to_calls() -> None:
    history = [
        asked("call_0123456789", "toolu_01"),
        result("toolu_01"),
        result("call_0123456789"),
    ]
    first = prepared(history, NINES)
    ids = [each["id"] for each in first[0]["tool_calls"]]
    assert all(NINE.fullmatch(each) for each in ids)
    assert [first[1]["tool_call_id"], first[2]["tool_call_id"]] == ids[::-1]
    later = prepared([{"role": "user", "content": "q"}, *history], NINES)
    assert later[1:] == first  # the prefix of a later turn is that of the first
    assert history[0]["tool_calls"][0]["id"] == "call_0123456789"


def test_ids_of_nine_characters_stay_as_they_are() -> None:
    shown = prepared([asked("a1b2c3d4e"), result("a1b2c3d4e")], NINES)
    assert shown[0]["tool_calls"][0]["id"] == shown[1]["tool_call_id"] == "a1b2c3d4e"


@pytest.mark.parametrize("missing", ["", None])
def test_calls_and_results_without_ids_are_tied_in_order(missing: str | None) -> None:
    shown = prepared([asked("", ""), result(missing, "first"), result(missing, "second")], NINES)
    ids = [each["id"] for each in shown[0]["tool_calls"]]
    assert len(set(ids)) == 2
    assert [turn["tool_call_id"] for turn in shown[1:]] == ids


def test_ids_stay_where_the_template_takes_any() -> None:
    assert prepared([asked("call_1")], TemplateFeatures())[0]["tool_calls"][0]["id"] == "call_1"


def test_arguments_are_text_where_the_template_prints_them() -> None:
    history = [{"role": "assistant", "content": None, "tool_calls": [call("1", "f", {"city": "Łódź"})]}]
    (shown,) = prepared(history, TemplateFeatures(text_arguments=True))
    assert shown["tool_calls"][0]["function"]["arguments"] == '{"city": "Łódź"}'
    assert "content" not in shown
    assert history[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Łódź"}


def test_results_have_the_role_of_the_family() -> None:
    assert prepared([result("1")], TemplateFeatures(result_role="ipython"))[0]["role"] == "ipython"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_each_of_their_names(name: str) -> None:
    (shown,) = prepared([{"role": "assistant", "content": "a", name: "t"}], TemplateFeatures())
    assert shown["reasoning_content"] == shown["thinking"] == "t"
