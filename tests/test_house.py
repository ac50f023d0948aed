"""The house rules that a machine can hold: imports, sizes, edges, words. See CONTRIBUTING.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "runtime").rglob("*.py"))

LAYERS = [
    {"errors", "logs", "files", "net"},
    {"config"},
    {"model_source", "presets", "hardware", "oci", "packaged"},
    {"models", "adapters", "memory", "merge", "metrics"},
    {"serving", "tuning"},
    {"workspace"},
    {"pod"},
    {"cli", "__main__"},
]
"""Lower first; a module imports from its own layer's modules and from lower ones."""

TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
EDGES = {"cli", "workspace", "logs", "hardware", "models", "__main__", "torchrun", "worker"}
"""Parts of module paths that may read the environment or the arguments of the process."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def layer(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "runtime" or len(parts) < 2:
        return None
    return next((number for number, names in enumerate(LAYERS) if parts[1] in names), None)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.fixture(scope="module", params=SOURCES, ids=name_of)
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_imports_point_one_way(source: Path) -> None:
    me = name_of(source)
    mine = layer(me)
    if me.endswith("__main__") or mine is None:
        return
    for imported in imports(parse(source)):
        theirs = layer(imported)
        assert theirs is None or theirs <= mine, f"{me} imports {imported}, a higher layer"


def test_serving_and_tuning_do_not_know_each_other(source: Path) -> None:
    me = name_of(source)
    for one, other in [("serving", "tuning"), ("tuning", "serving")]:
        if me.startswith(f"runtime.{one}"):
            assert not [i for i in imports(parse(source)) if i.startswith(f"runtime.{other}")]


def test_only_oci_imports_oras(source: Path) -> None:
    if not name_of(source).startswith("runtime.oci"):
        assert not [i for i in imports(parse(source)) if i.split(".")[0] == "oras"]


def test_the_environment_is_read_at_the_edges_only(source: Path) -> None:
    if EDGES & set(name_of(source).split(".")):
        return
    text = source.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "os.getenv" not in text
    assert "sys.argv" not in text


def test_every_module_says_what_it_is(source: Path) -> None:
    assert ast.get_docstring(parse(source)), f"{name_of(source)} has no header"


def test_files_and_functions_stay_small(source: Path) -> None:
    lines = source.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 500, f"{name_of(source)} has {len(lines)} lines"
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 55, f"{name_of(source)}.{node.name} has {length} lines"


def test_public_functions_and_classes_are_described(source: Path) -> None:
    for node in parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            assert ast.get_docstring(node), f"{name_of(source)}.{node.name} has no docstring"


def test_no_attic() -> None:
    attics = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in attics]


@pytest.mark.parametrize(
    "module",
    [
        "runtime.cli.main",
        "runtime.workspace",
        "runtime.oci",
        "runtime.serving.http.schema",
        "runtime.presets",
    ],
)
def test_light_modules_import_without_torch(module: str) -> None:
    code = f"import {module}, sys; print(sorted({TORCH!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_project_names_no_package_registry() -> None:
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org", "deb.debian" + ".org"]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            text = path.read_bytes().decode("utf-8", errors="ignore")
            assert not [host for host in hosts if host in text], name
