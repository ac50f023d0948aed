"""The house rules that a machine can hold, one test a rule; each lists all offenders. See CONTRIBUTING.md."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "runtime").rglob("*.py"))

LAYERS = [
    {
        "errors",
        "logs",
        "files",
        "net",
        "addresses",
        "child",
        "forks",
        "content_codings",
        "garbage_collection",
        "ports",
        "quantities",
        "redaction",
        "transfers",
    },
    {"config"},
    {
        "families",
        "model_source",
        "model_files",
        "model_weights",
        "presets",
        "nvml",
        "cuda_devices",
        "hardware",
        "torch_build",
        "attention",
        "gpus",
        "instance_types",
        "utilisation",
        "oci",
        "packaged",
        "weights_digest",
    },
    {
        "models",
        "chat_template",
        "support",
        "lora_patterns",
        "adapters",
        "memory",
        "merge",
        "metrics",
        "packing",
        "provenance",
    },
    {"serving", "tuning"},
    {"workspace"},
    {"pod"},
    {"cli"},
]
"""Lower first; a module imports from its own layer's modules and from lower ones."""

ROOMS = {
    "serving": [
        {"settings", "engine", "rate_limits"},
        {
            "keys",
            "generation",
            "generation_config",
            "tokenizer",
            "structured_output",
            "lifecycle",
            "loading",
            "replica",
            "check",
            "adapter_sources",
        },
        {"http"},
    ],
    "serving.engine": [{"kernels", "protocol"}],
    "tuning": [
        {"process"},
        {"data", "model"},
        {"loss", "precision"},
        {"train"},
        {"fit", "report", "publish"},
        {"job"},
        {"launcher", "worker"},
    ],
}
"""The same inside a package, for the parts that are named; parts that are not named stand anywhere."""

ENTRY_POINTS = {"runtime.__main__", "runtime.tuning.__main__"}
"""Join what lies below them, above all layers; nothing imports them."""

TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
EDGES = {"cli", "workspace", "logs", "hardware", "models", "__main__", "torchrun", "worker"}
"""Parts of module paths that may read the environment or the arguments of the process."""

MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 40

CROSS_CUTTING = {
    "tests/attacks": None,
    "tests": {
        "test_adapter_chain",
        "test_house",
        "test_readme",
        "test_docs",
        "test_demo",
        "test_bench_gpu",
        "test_tool_call_tuning",
    },
    "tests/clients": None,
    "tests/cli": {"test_odd_invocations"},
    "tests/contract": None,
    "tests/faults": None,
    "tests/oci": {"test_engines", "test_eviction", "test_faults"},
    "tests/pod": {"test_scripts"},
    "tests/serving/engine": {"test_pool_traffic"},
    "tests/tuning": {"test_main"},
    "tests/tuning/data": {"test_data_page"},
    "tests/workspace": {"test_settings_page"},
}
"""Test files without a module of their own, by folder; None allows all of them."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the dotted names that a module imports anywhere: in functions and for types only, too."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module or ''}.{alias.name}" for alias in node.names)
    return frozenset(found)


@cache
def targets(path: Path) -> frozenset[str]:
    """Return the project's modules that a module imports."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imports(path)}
    return frozenset(found & MODULES.keys() - {name_of(path)})


def level(module: str, package: str, layers: list[set[str]]) -> int | None:
    """Return the place among `layers` of the part of `package` that `module` belongs to."""
    if not module.startswith(f"{package}."):
        return None
    part = module.removeprefix(f"{package}.").split(".")[0]
    return next((number for number, names in enumerate(layers) if part in names), None)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its number of lines, decorators not counted."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name_of(path)}.{node.name}", (node.end_lineno or 0) - node.lineno + 1


def no_offenders(offenders: Iterable[object]) -> None:
    listed = sorted(str(offender) for offender in offenders)
    assert not listed, "\n" + "\n".join(listed)


def test_imports_point_one_way() -> None:
    packages = [("runtime", LAYERS), *((f"runtime.{room}", layers) for room, layers in ROOMS.items())]
    no_offenders(
        f"{me} imports {target}, a higher layer of {package}"
        for package, layers in packages
        for me, path in MODULES.items()
        for target in targets(path)
        if me not in ENTRY_POINTS
        and (mine := level(me, package, layers)) is not None
        and (theirs := level(target, package, layers)) is not None
        and theirs > mine
    )


def test_every_module_has_a_layer() -> None:
    parts = set.union(*LAYERS) | {"__main__"}
    no_offenders(name for name in MODULES if name != "runtime" and name.split(".")[1] not in parts)


def test_nothing_imports_an_entry_point() -> None:
    no_offenders(me for me, path in MODULES.items() if targets(path) & ENTRY_POINTS)


def test_imports_run_in_no_circle() -> None:
    reached: dict[str, set[str]] = {}

    def reach(module: str) -> set[str]:
        """Return all that `module` imports, directly or not."""
        if module not in reached:
            reached[module], waiting = set(), [module]
            while waiting:
                for target in targets(MODULES[waiting.pop()]) - reached[module]:
                    reached[module].add(target)
                    waiting.append(target)
        return reached[module]

    no_offenders(f"{me} imports itself, by way of others" for me in MODULES if me in reach(me))


def test_serving_and_tuning_do_not_know_each_other() -> None:
    pairs = [("runtime.serving", "runtime.tuning"), ("runtime.tuning", "runtime.serving")]
    no_offenders(
        f"{me} imports {target}"
        for me, path in MODULES.items()
        for target in targets(path)
        for one, other in pairs
        if me.startswith(one) and target.startswith(other)
    )


def test_only_oci_imports_oras() -> None:
    no_offenders(
        me
        for me, path in MODULES.items()
        if not me.startswith("runtime.oci") and any(name.split(".")[0] == "oras" for name in imports(path))
    )


def test_only_nvml_imports_pynvml() -> None:
    no_offenders(
        me
        for me, path in MODULES.items()
        if me != "runtime.nvml" and any(name.split(".")[0] == "pynvml" for name in imports(path))
    )


def test_the_environment_is_read_at_the_edges_only() -> None:
    no_offenders(
        me
        for me, path in MODULES.items()
        if not EDGES & set(me.split("."))
        and any(word in path.read_text(encoding="utf-8") for word in ("os.environ", "os.getenv", "sys.argv"))
    )


def test_every_module_says_what_it_is() -> None:
    no_offenders(me for me, path in MODULES.items() if not ast.get_docstring(parse(path)))


def test_public_functions_and_classes_are_described() -> None:
    no_offenders(
        f"{me}.{node.name}"
        for me, path in MODULES.items()
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if node.name[0] != "_" and not ast.get_docstring(node)
    )


def test_files_stay_small() -> None:
    lengths = {me: len(path.read_text(encoding="utf-8").splitlines()) for me, path in MODULES.items()}
    no_offenders(f"{me}: {lines} lines" for me, lines in lengths.items() if lines > MOST_FILE_LINES)


def test_functions_stay_small() -> None:
    lengths = [each for path in SOURCES for each in functions(path)]
    no_offenders(f"{name}: {lines} lines" for name, lines in lengths if lines > MOST_FUNCTION_LINES)


def test_a_class_has_a_name_of_its_own() -> None:
    modules = defaultdict(list)
    for me, path in MODULES.items():
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                modules[node.name].append(me)
    no_offenders(f"{name}: {', '.join(found)}" for name, found in modules.items() if len(found) > 1)


def test_no_attic() -> None:
    attics = {"utils.py", "common.py", "helpers.py", "misc.py"}
    no_offenders(path for path in SOURCES if path.name in attics)


def test_tests_mirror_the_packages() -> None:
    strays = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT)
        allowed = CROSS_CUTTING.get(folder.as_posix(), set())
        module = ROOT / "runtime" / folder.relative_to("tests") / path.name.removeprefix("test_")
        package = module.with_suffix("")
        if allowed is not None and path.stem not in allowed and not module.exists() and not package.is_dir():
            strays.append(path.relative_to(ROOT))
    no_offenders(strays)


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
    texts = {
        name: (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        for name in listed.decode().split("\0")
        if name and (ROOT / name).is_file()
    }
    no_offenders(name for name, text in texts.items() if any(host in text for host in hosts))
