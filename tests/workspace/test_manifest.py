"""Workspace manifests: both API versions, and one readable line for each mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runtime.cli import main
from runtime.errors import ConfigError
from runtime.workspace import load_server
from tests.workspace.documents import SEED, SERVE, load, manifest, write
from tests.workspace.manifests import DOCUMENTS, Written
from tests.workspace.odd_manifests import ODD_DOCUMENTS


def test_both_api_versions_read_alike(tmp_path: Path) -> None:
    old = load(write(tmp_path, manifest()), tmp_path).config
    new = load(write(tmp_path, manifest(apiVersion="kaito.sh/v1beta1")), tmp_path).config
    assert old == new


@pytest.mark.parametrize("method", ["QLoRA", "qlora", "QLORA"])
def test_method_may_be_written_in_any_case(method: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, manifest(tuning__method=method)), tmp_path).config.method == "qlora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning__preset__nam": "x"}, r"unknown key 'tuning\.preset\.nam' \(did you mean 'name'"),
        (
            {"tuning__preset__name": "phi-3-mini-128k-instuct"},
            "tuning.preset.name.*'phi-3-mini-128k-instruct'",
        ),
        ({"tuning__method": "full"}, r"'tuning\.method' is 'full'"),
        ({"tuning__input__urls": "http://x"}, r"'tuning\.input\.urls' is 'http://x'"),
        ({"tuning__input__urls": ["file:///etc/passwd"]}, "expected addresses with http"),
        (
            {"tuning__input": {"urls": ["http://x"], "image": "y"}},
            "exactly one of 'urls', 'image' and 'volumeSource'",
        ),
        ({"tuning__output": {}}, "exactly one of 'image' and 'volumeSource'"),
        ({"tuning__output": None}, r"'tuning\.output' is missing"),
        ({"tuning": None}, "exactly one of 'tuning' and 'inference'"),
        ({"inference": {"preset": {"name": "phi-4"}}}, "exactly one of 'tuning' and 'inference'"),
        ({"apiVersion": "kaito.sh/v2"}, "'apiVersion' is 'kaito.sh/v2', expected kaito.sh/v1alpha1"),
        ({"kind": "Workspac"}, "kind: Workspace.*found Workspac"),
        ({"tuning__preset__name": "gpt-oss-20b"}, "can be served but not tuned"),
        ({"tuning__input": {"volume": {}}}, "did you mean 'volumeSource'"),
    ],
)
def test_wrong_manifest_is_one_line_with_the_key(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path, manifest(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load(file, tmp_path)
    assert "\n" not in str(caught.value)
    assert "job.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            [{"source": {"name": "a", "image": "x"}}, {"source": {"name": "a", "image": "y"}}],
            "two adapters named 'a'",
        ),
        ([{"source": {"name": "a", "image": "x"}, "strength": "1.5"}], "strength"),
        ([{"source": {"name": "a", "urls": ["http://x"]}}], "not possible for an adapter"),
        ([{"source": {"image": "x"}}], "'source.name' is missing"),
        ([{"source": {"name": "a"}}], "exactly one of 'image' and 'volumeSource'"),
        ([{"source": {"name": f"a{n}", "image": "x"}} for n in range(11)], "10 at most"),
    ],
)
def test_wrong_adapters_are_refused(adapters: list[Any], message: str, tmp_path: Path) -> None:
    document = yaml.safe_load(SERVE.read_text())
    document["inference"]["adapters"] = adapters
    with pytest.raises(ConfigError, match=message):
        load_server(write(tmp_path, document), environ={}, root=tmp_path)


def test_other_kind_of_workspace_is_refused_with_the_right_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runtime serve"):
        load(SERVE, tmp_path)
    with pytest.raises(ConfigError, match="runtime tune"):
        load_server(SEED, environ={}, root=tmp_path)


@pytest.mark.parametrize("written", [*DOCUMENTS, *ODD_DOCUMENTS], ids=lambda written: written.name)
def test_documents_are_taken_or_refused_for_a_reason(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workspace.yaml"
    file.write_bytes(written.text.encode())
    environ = {"HOME": str(tmp_path), "RUNTIME_CACHE": str(tmp_path)}
    status = main.run([*written.arguments, str(file)], environ)
    out, err = capsys.readouterr()
    if written.refused:
        assert status == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert re.search(written.refused, line), line
        return
    assert status == 0, err
    shown = json.loads(out)
    values = {name: setting["value"] for name, setting in shown["settings"].items()}
    assert {name: values.get(name) for name in written.settings} == written.settings
    assert not written.says or any(re.search(written.says, warning) for warning in shown["warnings"])


def test_names_of_the_documents_are_different() -> None:
    documents = [*DOCUMENTS, *ODD_DOCUMENTS]
    assert len({written.name for written in documents}) == len(documents) >= 140


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)


@given(
    st.sampled_from(
        [
            "tuning",
            "tuning__input",
            "tuning__output",
            "tuning__preset",
            "resource",
            "metadata",
            "tuning__method",
        ]
    ),
    values,
)
def test_any_wrong_manifest_fails_with_one_line(
    tmp_path_factory: pytest.TempPathFactory, path: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    document = manifest(**{path: value if value is not None else ""})
    try:
        load(write(folder, document), folder)
    except ConfigError as error:
        assert "\n" not in str(error)
