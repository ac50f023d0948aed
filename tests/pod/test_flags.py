"""Reading of flags as controllers write them."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.pod import flags


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), st.from_regex(r"[\w./=-]{0,8}", fullmatch=True)
    )
)
def test_both_ways_to_write_a_value_are_read(values: dict[str, str]) -> None:
    assert flags.read([f"--{name}={value}" for name, value in values.items()]) == values
    apart = {name: value for name, value in values.items() if not value.startswith("-")}
    assert flags.read([word for name, value in apart.items() for word in (f"--{name}", value)]) == apart


def test_negative_numbers_are_values_and_bare_flags_are_true() -> None:
    assert flags.read(["--seed", "-1", "--enable-lora", "--x=", "stray"]) == {
        "seed": "-1",
        "enable_lora": None,
        "x": "",
    }
    assert [flags.truth(word) for word in (None, "False", "yes", "maybe")] == [True, False, True, None]
