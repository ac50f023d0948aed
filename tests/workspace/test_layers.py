"""Layers of settings."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.config import flatten
from runtime.workspace.layers import LayeredSettings

names = st.sampled_from(["a", "b", "a.b", "a.c", "b.a.c", "a.b.c"])


@given(st.lists(st.tuples(names, st.integers())))
def test_last_layer_wins_and_names_its_source(layers: list[tuple[str, int]]) -> None:
    settings = LayeredSettings()
    for place, (name, value) in enumerate(layers):
        settings.put(name, value, f"layer {place}")
        assert settings.get(name) == value
    for name, value in flatten(settings.values).items():
        place = max(place for place, (written, _) in enumerate(layers) if written == name)
        assert settings.sources[name] == f"layer {place}"
        assert layers[place][1] == value
