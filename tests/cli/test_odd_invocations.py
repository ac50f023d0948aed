"""Command lines that nobody means to type: one line, the right status, no traceback.

Paths of the wrong kind, names that are empty or cannot be shown, flags that have no effect.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import oci
from runtime.cli import main
from runtime.oci.blobs import from_bytes
from runtime.oci.image import CONFIG, LAYER_TAR, Image
from tests.cli.conftest import failure_line
from tests.oci.conftest import archive

LONG = "x" * 300
BYTES = os.fsdecode(b"\xff")
"""An argument that is no UTF-8."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one of everything that a path can be."""
    monkeypatch.chdir(tmp_path)
    for folder in ("ad", "empty", "full", "broken/index.json", "bad"):
        Path(folder).mkdir(parents=True)
    Path("ad/adapter_config.json").write_text("{}")
    for file in ("FILE", "full/z"):
        Path(file).write_text("x")
    for layout in ("broken", "bad"):
        Path(layout, "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    Path("bad/index.json").write_text("[")
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    oci.push(Path("ad"), oci.parse("oci:lay:v1"))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("push ad oci:FILE/x:v1", 2, "FILE is a file, expected a directory for the OCI layout"),
        ("push ad oci:FILE:v1", 2, "FILE: is a file"),
        ("push ad oci:full:v1", 2, "holds files but no OCI layout"),
        ("push ad oci:/proc/x:v1", 2, "/proc/x: cannot be used"),
        ("push ad oci:/proc/self/x/y:v1", 2, "cannot be used"),
        ("push ad oci:/dev/null:v1", 2, "/dev/null: is a file"),
        ("push ad oci:/dev/null/x:v1", 2, "/dev/null is a file"),
        ("push ad oci:fifo:v1", 2, "fifo: is a file"),
        ("push ad oci:loop:v1", 2, "loop: is a link that leads to no directory"),
        ("push ad oci:loop/x:v1", 2, "loop is a link that leads to no directory"),
        ("push ad oci:dangling:v1", 2, "dangling: is a link that leads to no directory"),
        ("push ad oci:bad:v1", 5, "not an OCI index"),
        ("push ad oci:broken:v1", 2, "cannot be used"),
        (f"push ad oci:{LONG}:v1", 2, "File name too long"),
        ("push FILE oci:o:v1", 2, "no such directory"),
        ("push empty oci:o:v1", 2, "holds no files"),
        ("push loop oci:o:v1", 2, "no such directory"),
        ("push ad oci:o:v1 --file ../FILE", 2, "leads out of ad"),
        ("push ad oci:o:v1 --file /etc/passwd", 2, "leads out of ad"),
        ("push ad oci:o:v1 --file .", 2, "is no file"),
        ("push ad oci:o:v1 --annotation =bar", 2, "--annotation '=bar': expected KEY=VALUE"),
        ("push ad oci:o:v1 --annotation foo", 2, "--annotation 'foo': expected KEY=VALUE"),
        ("push ad oci:o:v1 --annotation a=1 --annotation a=2", 2, "'a' is given twice"),
        (["push", "ad", "oci:o:v1", "--annotation", f"a={BYTES}"], 2, "cannot be shown"),
        (["push", "ad", "oci:o:v1", "--annotation", f"{BYTES}=a"], 2, "expected a key in printable"),
        (["push", "ad", "oci:o:v1", "--annotation", "a\x1b=b"], 2, "expected a key in printable"),
        (["push", "ad", "oci:o:v1", "--annotation", "a\nb=c"], 2, "expected a key in printable"),
        (["push", "ad", "oci:o:v1", "--annotation", " =b"], 2, "expected a key in printable"),
        (["push", "ad", "oci:o:v1", "--annotation", "a=\x1b[31mb"], 2, "cannot be shown"),
        (["push", "ad", "oci:o:v1", "--base", ""], 2, "image ''"),
        ("push ad oci:o:v1 --base oci:lay:v1 --modelpack", 2, "exclude each other"),
        ("push ad oci:o:v1 --base oci:FILE", 5, "no such image"),
        (["push", "", "oci:o:v1"], 2, "is empty, expected a path"),
        (["push", BYTES, "oci:o:v1"], 2, "no such directory"),
        (["push", "ad", ""], 2, "image ''"),
        (["push", "ad", " "], 2, "image ' '"),
        ("push ad oci:o:v1 --auth nope", 2, "nope: no such file"),
        ("push ad oci:o:v1 --auth fifo", 2, "fifo: no such file"),
        ("push ad oci:o:v1 --ca-file nope", 2, "nope: no such file"),
        ("inspect oci:bad:v1", 5, "not an OCI index"),
        ("inspect oci:broken:v1", 5, "no such image"),
        ("inspect oci:FILE/x:v1", 5, "no such image"),
        ("inspect oci:loop:v1", 5, "no such image"),
        (f"inspect oci:{LONG}", 2, "File name too long"),
        (["inspect", BYTES], 2, "repository"),
        (["inspect", ""], 2, "image ''"),
        ("inspect 127.0.0.1:9/x:v1 --ca-file nope", 2, "nope: no such file"),
        ("inspect 127.0.0.1:9/x:v1 --ca-file FILE", 2, "no certificate in PEM form"),
        ("pull oci:lay:v1 FILE", 2, "FILE: is a file, expected a folder to pull into"),
        ("pull oci:lay:v1 FILE/foo", 2, "FILE is a file"),
        ("pull oci:lay:v1 /proc/foo", 2, "cannot be used"),
        ("pull oci:lay:v1 /proc/self/foo", 2, "cannot be used"),
        ("pull oci:lay:v1 /dev/null", 2, "/dev/null: is a file"),
        ("pull oci:lay:v1 /dev/null/x", 2, "/dev/null is a file"),
        ("pull oci:lay:v1 loop", 2, "loop: is a link"),
        ("pull oci:lay:v1 loop/x", 2, "loop is a link"),
        ("pull oci:lay:v1 dangling", 2, "dangling: is a link"),
        ("pull oci:lay:v1 fifo", 2, "fifo: is a file"),
        ("pull oci:lay:v1 full", 2, "holds other files"),
        (["pull", "oci:lay:v1", LONG], 2, "File name too long"),
        (["pull", "oci:lay:v1", ""], 2, "is empty, expected a path"),
        ("pull oci:lay:v1 c --cache FILE", 2, "FILE: is a file, expected a folder for the cache"),
        ("pull oci:lay:v1 c --cache FILE/x", 2, "FILE is a file"),
        ("pull oci:lay:v1 c --cache /proc/x", 2, "cannot be used"),
        (["pull", "oci:lay:v1", "c", "--cache", ""], 2, "is empty, expected a path"),
        ("pull oci:lay:nope q", 5, "no such image"),
        ("merge oci:FILE/x out", 5, "no such image"),
        ("merge ./nope out", 2, "no directory ./nope"),
        ("merge ad out", 2, "peft_type is None"),
        (["merge", "ad", ""], 2, "is empty, expected a path"),
        ("merge ad out --dtype int8", 2, "not one of"),
        (["presets", ""], 2, "unknown preset ''"),
        (["presets", "\x1b[31m"], 2, "unknown preset"),
        (["presets", BYTES], 2, "unknown preset"),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, str | list) else str(value),
)
def test_odd_command_line_is_one_line_with_its_status(
    here: Path, capfd: pytest.CaptureFixture[str], command: str | list[str], status: int, message: str
) -> None:
    before = sorted(path.name for path in here.iterdir())
    assert main.run(command.split() if isinstance(command, str) else command, {}) == status
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if line.lower().startswith("error:")]
    assert message in line
    assert "internal error" not in said
    assert "Traceback" not in said
    assert "\x1b" not in said
    assert sorted(path.name for path in here.iterdir()) == before, "nothing is left"


@pytest.mark.parametrize("flag", ["--ca-file FILE", "--auth FILE", "--insecure"])
def test_flags_for_registries_are_said_to_have_no_effect_on_a_layout(
    here: Path, capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    for command in ("push ad oci:new:v1", "inspect oci:lay:v1", "pull oci:lay:v1 back"):
        assert main.run([*command.split(), *flag.split()], {}) == 0
        assert f"{flag.split(maxsplit=1)[0]} without effect" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command", ["tune", "serve", "chat", "manifest", "plan", "merge", "presets", "push", "pull", "inspect"]
)
def test_every_command_takes_debug_as_its_errors_advise(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main.run([command, "--help"], {}) == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", "a␊b"),
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("\ud800", "\ufffd"),
        ("\u202eabc", "\ufffdabc"),
        ("a\x85b\u2028c", "a\ufffdb\ufffdc"),
    ],
)
def test_inspect_shows_what_it_was_sent_in_printable_characters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], value: str, shown: str
) -> None:
    """Other tools push annotations that ours refuses."""
    layer, config = from_bytes(archive(("data/x", b"1")), LAYER_TAR), from_bytes(b"{}", CONFIG)
    manifest = {
        "schemaVersion": 2,
        "config": config.descriptor.as_json(),
        "layers": [layer.descriptor.as_json()],
        "annotations": {"key\n2": "", "note": value},
    }
    image = Image(json.dumps(manifest).encode(), (layer, config))
    oci.push_image(lambda: image, oci.parse(f"oci:{tmp_path}/lay:v1"))
    capfd.readouterr()
    assert main.run(["inspect", f"oci:{tmp_path}/lay:v1"], {}) == 0
    lines = capfd.readouterr().out.splitlines()
    at = lines.index("key␊2")  # what is signed and stated comes behind the annotations
    assert lines[at + 1].split() == ["note", *shown.split()]
    assert main.run(["inspect", f"oci:{tmp_path}/lay:v1", "--json"], {}) == 0
    assert json.loads(capfd.readouterr().out)["annotations"]["note"] == value


@pytest.mark.parametrize(
    ("words", "name", "key"),
    [
        (["plan", "--gpu", "V100-16GB", "MODEL"], "config.json", "vocab_size"),
        (["tune", "--dry-run", "MODEL", "--data", "."], "config.json", "hidden_size"),
        (["tune", "--dry-run", "MODEL", "--data", "."], "generation_config.json", "top_k"),
        (["serve", "--dry-run", "MODEL"], "config.json", "hidden_size"),
        (["serve", "--check", "MODEL"], "generation_config.json", "top_k"),
    ],
)
def test_a_model_with_an_odd_value_ends_each_command_in_one_line(
    tiny_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    name: str,
    key: str,
) -> None:
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    values = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**values, key: {}}))
    assert main.run([str(model) if word == "MODEL" else word for word in words], {}) == 2
    said = failure_line(capsys)
    assert f"{model / name}: '{key}' is a mapping, expected a whole number" in said


@pytest.mark.parametrize("words", [["tune", "MODEL", "--data", "."], ["serve", "MODEL"]])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "config.json").write_text("[" * 100_000), "nested too deeply"),
        (
            lambda model: os.truncate(model / "config.json", 10 << 30),
            "has 10737418240 bytes, expected at most",
        ),
    ],
)
def test_a_dry_run_refuses_the_model_directory_that_the_run_refuses(
    tiny_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    spoil(model)
    arguments = [str(model) if word == "MODEL" else word for word in words]
    assert main.run([*arguments, "--dry-run"], {}) == 2
    assert message in failure_line(capsys)
