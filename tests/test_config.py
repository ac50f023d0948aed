"""Reading configuration: YAML 1.2 scalars, and one readable line for whatever does not fit."""

from pathlib import Path
from typing import Literal

import pytest

from runtime import config
from runtime.errors import ConfigError


class Wheel(config.Strict):
    size_mm: float = 1.0


class Car(config.Strict):
    colour: Literal["red", "blue"] = "red"
    wheels: tuple[Wheel, ...] = ()
    spare: Wheel | None = None
    electric: bool = False


def one_yaml(text: str) -> dict[str, object]:
    (document,) = config.yaml_documents(text, "car.yaml")
    return document


def test_scientific_notation_without_a_dot_is_a_number() -> None:
    assert one_yaml("rate: 1e-5") == {"rate": 1e-5}


def test_a_version_and_a_date_stay_text() -> None:
    assert one_yaml("tag: 0.0.1\nday: 2024-01-01") == {"tag": "0.0.1", "day": "2024-01-01"}


def test_no_is_a_word_and_still_false_for_a_boolean_field() -> None:
    assert one_yaml("save_strategy: no") == {"save_strategy": "no"}
    assert config.parse(Car, one_yaml("electric: no"), "car.yaml").electric is False


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))


def test_json_is_read_with_its_tabs() -> None:
    assert one_yaml('{\n\t"a": [1, null],\n\t"b": "x"\n}') == {"a": [1, None], "b": "x"}
    assert one_yaml("{a: b}") == {"a": "b"}  # YAML's flow style


def test_merged_keys_may_be_written_anew_wherever_the_anchor_stands() -> None:
    text = "base: &base {size: 1}\nfirst: {deep: {deeper: &own {<<: *base, size: 2}}}\nlast: {<<: *own}\n"
    assert one_yaml(text)["first"] == {"deep": {"deeper": {"size": 2}}}


def test_a_key_without_a_value_is_absent_in_a_sparse_model() -> None:
    class Ticket(config.Sparse):
        row: int = 3

    assert config.parse(Ticket, one_yaml("row:"), "ticket.yaml").row == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "car.yaml: line 1 not valid YAML"),
        ("a: 1\na: 2", "car.yaml: line 2 not valid YAML: key 'a' is written twice"),
        ("- 1", "car.yaml: expected keys and values, found a list"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a:\n\tb: 1", "car.yaml: line 2 not valid YAML: a tab; indent with spaces"),
        ('{"a": 1, "a": 2}', "not valid YAML: key 'a' is written twice"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("b: 1\na: !!timestamp x", "car.yaml: line 2 not valid YAML: 'x' cannot be read as timestamp"),
        ("b: 1\na: {{ .Values.a }}", "car.yaml: line 2 not valid YAML: a variable of a template"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: a number of more than 4,300 digits"),
        ("a: &a [*a]", "stands for more than"),
        (LAUGHS, "stands for more than"),
    ],
)
def test_broken_yaml_is_named_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.yaml_documents(text, "car.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"color": "red"}, "car.yaml: unknown key 'color' (did you mean 'colour'?)"),
        ({"zzz": 1}, "car.yaml: unknown key 'zzz'; known: colour, electric, spare, wheels"),
        ({"wheels": [{"size": 1}]}, "car.yaml: unknown key 'wheels.0.size' (did you mean 'size_mm'?)"),
        ({"spare": {"size": 1}}, "car.yaml: unknown key 'spare.size' (did you mean 'size_mm'?)"),
        ({"wheels": [{"size_mm": "x"}]}, "car.yaml: 'wheels.0.size_mm' is 'x': should be a valid number"),
        ({"electric": "maybe"}, "car.yaml: 'electric' is 'maybe': should be a valid boolean"),
        ({"colour": "green"}, "car.yaml: 'colour' is 'green': should be 'red' or 'blue'"),
    ],
)
def test_what_does_not_fit_is_one_line_with_key_value_and_expectation(data: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(Car, data, "car.yaml")
    assert str(caught.value).startswith(expected)


def test_a_missing_file_a_directory_and_binary_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
    for path, expected in [
        (tmp_path / "none", "no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "bin", "not UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            config.read_text(path)
