"""The description of the routes: every route has one, docs/api.md is made of it, and its examples run.

To write docs/api.md anew: `python -m tests.serving.http.test_description`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.metrics import ServingMetrics
from runtime.serving.http.app import create_app
from runtime.serving.http.constraint_fields import ConstraintFields
from runtime.serving.http.description import BASE, ERRORS, ROUTES
from runtime.serving.http.schema import SamplingFields
from runtime.serving.lifecycle import Lifecycle
from runtime.serving.settings import Limits
from tests.serving.conftest import Process, start_fake_server

PAGE = Path(__file__).parents[3] / "docs/api.md"
SEPARATOR = "<<<next>>>"
SHARED = {*SamplingFields.model_fields, *ConstraintFields.model_fields}
"""Fields of all routes that generate: listed once."""
WORDS = {
    "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "length ≤",
    "minLength": "length ≥", "maxItems": "entries ≤", "minItems": "entries ≥",
}  # fmt: skip
INTRODUCTION = f"""# Routes

A running server shows this page at `/docs`, with a form to try each route, and as data at `/openapi.json`.
Here the server is `{BASE}` and the key is in the variable API_KEY; without a key the header does no
harm. Health routes, `/metrics`, `/docs` and `/openapi.json` need none.

Every error has OpenAI's form, `{{"error": {{"message", "type", "param", "code"}}}}`; outside `/v1` also
`detail`. Each answer has an `x-request-id`, which the server's log has too. [http.md](http.md) says what
becomes of other fields, [keys.md](keys.md) what a key may do.
"""


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return description()


def description() -> dict[str, Any]:
    """Return what /openapi.json answers."""
    app = create_app(lifecycle=Lifecycle(), metrics=ServingMetrics("base", lambda: None), limits=Limits())
    return app.openapi()


def operations(api: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_route_is_described(api: dict[str, Any]) -> None:
    assert {(method, path) for method, path, _ in operations(api)} == set(ROUTES)
    for _, path, operation in operations(api):
        assert operation["description"]
        assert operation["summary"]
        assert len(operation["x-codeSamples"]) == 3, path
        assert any("example" in content for content in operation["responses"]["200"]["content"].values())


def test_the_page_in_docs_is_what_the_routes_are(api: dict[str, Any]) -> None:
    wanted = page(api)
    assert PAGE.read_text(encoding="utf-8") == wanted, "python -m tests.serving.http.test_description"


def kind(field: Mapping[str, Any]) -> str:
    """Return a field's type in words."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    several = field.get("anyOf") or field.get("oneOf")
    if several:
        return " or ".join(dict.fromkeys(kind(it) for it in several if it.get("type") != "null"))
    if "enum" in field or "const" in field:
        return " or ".join(f"`{json.dumps(it)}`" for it in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}))}"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    return names.get(field.get("type", "anything"), field.get("type", "anything"))


def limits(field: Mapping[str, Any]) -> list[str]:
    """Return a field's limits, those of its forms too."""
    found = [(words, field[name]) for name, words in WORDS.items() if name in field]
    said = [f"{words} {int(most) if most == int(most) else most:,}" for words, most in found]
    for form in field.get("anyOf") or field.get("oneOf") or ():
        said += limits(form)
    return list(dict.fromkeys(said))


def rows(schema: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    yield "| field | type | default | limits | |"
    yield "|---|---|---|---|---|"
    for name in names:
        field = schema["properties"][name]
        default = f"`{json.dumps(field['default'])}`" if field.get("default") is not None else ""
        required = "**required**" if name in schema.get("required", ()) else default
        text = " ".join(field.get("description", "").split()).replace("|", "\\|")
        yield f"| `{name}` | {kind(field)} | {required} | {', '.join(limits(field))} | {text} |"


def page(api: Mapping[str, Any]) -> str:
    """Return docs/api.md."""
    schemas, lines = api["components"]["schemas"], [INTRODUCTION]
    for method, path, operation in operations(api):
        lines += [f"## {method.upper()} {path}\n", f"{operation['summary']}. {operation['description']}\n"]
        sent = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "$ref" in sent.get("schema", {}):
            schema = schemas[kind(sent["schema"])]
            required = schema.get("required", [])
            shared = set(schema["properties"]) >= SHARED
            own = [name for name in schema["properties"] if not (shared and name in SHARED)]
            own.sort(key=lambda name: (name not in required, name not in sent["example"]))
            lines += [*rows(schema, own), ""]
            if shared:
                lines.append("And the [fields of generation](#fields-of-generation).\n")
        for sample in operation["x-codeSamples"]:
            lines += [f"```{sample['lang'].lower()}", sample["source"], "```\n"]
        for content in operation["responses"]["200"]["content"].values():
            if isinstance(example := content.get("example"), dict):
                lines += ["Answer:\n", "```json", json.dumps(example, ensure_ascii=False), "```\n"]
        found = [status for status in operation["responses"] if status.isdecimal() and int(status) >= 400]
        if found:
            lines.append(f"Errors: {', '.join(found)}.\n")
    lines += ["## Fields of generation\n", "Taken by every route that generates.\n"]
    body = schemas["CompletionBody"]
    lines += [*rows(body, [name for name in body["properties"] if name in SHARED]), ""]
    lines += ["## Errors\n", "| status | meaning |", "|---|---|"]
    lines += [f"| {status} | {text} |" for status, text in ERRORS.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all examples, with a key, and with a folder of adapters that is empty."""
    root = tmp_path_factory.mktemp("adapters")
    site = start_fake_server(
        engine={"context_tokens": 4096}, config={"api_key": "example-key", "adapter_root": str(root)}
    )
    yield site
    site.close()


def in_a_shell(sources: list[str], folder: Path) -> list[str]:
    script = ['curl() { command curl -sS --max-time 120 "$@"; }', "set -e"]
    for source in sources:
        script += [source, f"echo; echo '{SEPARATOR}'"]
    return ["bash", str(written(folder / "run.sh", script))]


def in_python(sources: list[str], folder: Path) -> list[str]:
    script = [line for source in sources for line in (source, f"print('{SEPARATOR}')")]
    return [sys.executable, str(written(folder / "run.py", script))]


def in_node(sources: list[str], folder: Path) -> list[str]:
    script = [line for source in sources for line in ("{", source, "}", f"console.log('{SEPARATOR}');")]
    node = shutil.which("node", path=f"{Path(sys.prefix) / 'clients/bin'}:{os.environ['PATH']}")
    if node is None:
        pytest.skip("needs the clients' environment: make clients")
    return [node, str(written(folder / "run.mjs", script))]


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("label", "runner"),
    [("curl", in_a_shell), ("Python", in_python), ("JavaScript", in_node)],
)
def test_the_examples_run(
    api: dict[str, Any], server: Process, tmp_path: Path, label: str, runner: Any
) -> None:
    routes = [ROUTES[method, path] for method, path, _ in operations(api)]
    found = [op["x-codeSamples"] for _, _, op in operations(api)]
    sources = [
        next(sample["source"] for sample in samples if sample["label"] == label).replace(BASE, server.url)
        for samples in found
    ]
    ran = subprocess.run(
        runner(sources, tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"API_KEY": "example-key", "PATH": os.environ["PATH"], "NO_PROXY": "*"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = ran.stdout.split(SEPARATOR)[:-1]
    assert len(answers) == len(routes)
    for route, answer in zip(routes, answers, strict=True):
        if route.refused is not None:  # nothing is there to be loaded
            assert "error" in json.loads(answer), answer
        elif isinstance(route.answer, dict):
            assert set(route.answer) <= set(json.loads(answer)), answer
        else:
            assert answer.strip().startswith(("# HELP", "<!doctype")), answer[:200]


if __name__ == "__main__":
    PAGE.write_text(page(description()), encoding="utf-8")
