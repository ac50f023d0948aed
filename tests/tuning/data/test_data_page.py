"""docs/data.md: every example is a file and a command, and the command says what the page says."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.tuning.data.formats import FORMATS
from runtime.tuning.data.shapes import MESSAGES, PAIRS

PAGE = Path(__file__).parents[3] / "docs/data.md"
TEXT = PAGE.read_text(encoding="utf-8")
START, END = "<!-- formats -->\n", "<!-- /formats -->\n"
TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>
{% endif %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Renders all that the page's examples hold, as the template of the page's model does."""


@dataclass(frozen=True)
class PageExample:
    """Files, a command, and lines of its output."""

    files: tuple[tuple[str, str], ...]
    command: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return self.files[-1][0]


def examples() -> list[PageExample]:
    found, files, command = [], [], ""
    for info, body in re.findall(r"^```(.+?)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        language, _, name = info.partition(" ")
        if name:
            files.append((name, body))
        elif language == "sh":
            command = body.strip()
        else:
            found.append(PageExample(tuple(files), command, tuple(body.splitlines())))
            files = []
    return found


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("example", examples(), ids=str)
def test_every_example_works_as_it_is_printed(
    example: PageExample, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, content in example.files:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
        if name.endswith(".py"):
            exec(compile(content, name, "exec"), {})
    program, *words = shlex.split(example.command)
    assert program == "runtime"
    status = main.run([*words, "--set", f"model.path={model}"], {})
    output = capsys.readouterr()
    assert status == 0, output.err
    assert "⟦" in output.out
    assert set(example.lines) <= set(output.out.splitlines()), output.out


def formats_table() -> str:
    notes = {"parquet": "", "csv": "commas or semicolons", "json": "see below", "arrow": "files and streams"}
    return "| format | suffix | notes |\n|---|---|---|\n" + "".join(
        f"| {name} | {', '.join(f'`{suffix}`' for suffix in entry.suffixes)} | {notes.get(name, '')} |\n"
        for name, entry in FORMATS.items()
    )


def test_the_page_has_examples_of_every_shape_and_all_formats() -> None:
    assert len(examples()) >= 12
    assert TEXT.partition(START)[2].partition(END)[0] == formats_table()
    for name in (*MESSAGES, *(f"`{pair.question}`/`{pair.answers[0]}`" for pair in PAIRS)):
        assert f"{name}" in TEXT, name
