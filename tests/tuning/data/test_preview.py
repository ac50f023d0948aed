"""Rows as the model sees them: what is labelled, what is counted, and that no weights are read."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.cli import main, render
from runtime.errors import DataError
from runtime.model_source import ModelSource
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.preview import Preview, preview, runs
from runtime.tuning.data.tokenize import Encoder
from runtime.tuning.settings import DataSource, Encoding, TuningJob
from tests.tuning.data.template_families import FAMILIES

Maker = Callable[..., TuningJob]


@pytest.fixture
def without_weights(tiny_llama_dir: Path, tmp_path: Path) -> ModelSource:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return ModelSource(name="tiny", path=folder)


def labelled_texts(found: Preview) -> list[list[str]]:
    return [[run.text for run in shown.sequences[0] if run.labelled] for shown in found.examples]


def test_answers_with_their_end_are_labelled_and_the_rest_is_not(
    make_job: Maker, without_weights: ModelSource
) -> None:
    found = preview(make_job(model=without_weights), count=3)
    assert len(found.examples) == 3
    for shown, texts in zip(found.examples, labelled_texts(found), strict=True):
        number = int(shown.origin.rpartition(" ")[2]) - 1
        assert texts == [f"it is {number * 7}<|im_end|>"]
        whole = "".join(run.text for run in shown.sequences[0])
        assert whole.startswith(f"<|im_start|>user\nwhat is {number}?")
        assert shown.outcome == "whole"
        assert 0 < shown.labelled_tokens < shown.tokens == shown.full_tokens
    assert (found.train_rows, found.held_out_rows, found.counted) == (59, 5, 59)
    assert found.tokens > found.labelled_tokens > 0


def test_counts_are_those_that_training_logs(make_job: Maker, without_weights: ModelSource) -> None:
    from transformers import AutoTokenizer

    from runtime.tuning.data import dataset, folder, tokenize

    job = make_job(model=without_weights, encoding=Encoding(max_tokens=100, too_long="drop"))
    found = preview(job, count=1)
    paths = folder.local_paths(job.data.urls, job.data.folder)
    train, _ = dataset.split(dataset.load(job.data, paths).examples, job.data)
    tokenizer = AutoTokenizer.from_pretrained(str(without_weights.path))
    encoded = tokenize.encode(train, tokenize.Encoder(tokenizer, job.encoding, max_tokens=100), BadRows())
    assert (found.tokens, found.labelled_tokens) == (encoded.tokens, encoded.labelled_tokens)
    assert found.outcomes["too long"] == encoded.too_long > 0


def test_preview_says_how_many_sequences_split_rows_become(
    make_job: Maker, without_weights: ModelSource
) -> None:
    whole = preview(make_job(model=without_weights), count=1)
    assert whole.sequences == whole.counted
    assert not any(line.startswith("divided") for line in render.preview_counts(whole))
    split_rows = Encoding(max_tokens=24, too_long="split")
    parts = preview(make_job(model=without_weights, encoding=split_rows), count=1)
    assert f"divided  59 rows became {parts.sequences} sequences" in render.preview_counts(parts)


def test_rows_over_the_limit_show_what_is_left_of_them(make_job: Maker, without_weights: ModelSource) -> None:
    cut = preview(make_job(model=without_weights, encoding=Encoding(max_tokens=100)), count=59)
    long = [shown for shown in cut.examples if shown.full_tokens > 100]
    assert {shown.outcome for shown in long} == {"truncated", "too long"}
    assert all(shown.tokens <= 100 for shown in long)
    assert all(bool(shown.labelled_tokens) == (shown.outcome == "truncated") for shown in long)
    split_rows = Encoding(max_tokens=24, too_long="split")
    split = preview(make_job(model=without_weights, encoding=split_rows), count=59)
    assert {shown.outcome for shown in split.examples if shown.full_tokens > 24} == {"split"}


def test_data_that_training_would_refuse_is_shown_with_a_warning(
    make_job: Maker, without_weights: ModelSource
) -> None:
    strict = Encoding(max_tokens=8, too_long="drop")
    found = preview(make_job(model=without_weights, encoding=strict), count=1)
    assert found.examples[0].sequences == ()
    assert found.dropped == found.counted == 59
    assert "training refuses such data" in render.preview_counts(found)[-1]


def write_manifest(folder: Path, data: Path) -> Path:
    file = folder / "job.yaml"
    file.write_text(
        "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {name: look}\n"
        "resource: {instanceType: Standard_NC6s_v3, labelSelector: {matchLabels: {app: look}}}\n"
        "tuning:\n  preset: {name: smollm2-135m-instruct}\n  method: qlora\n"
        f"  input: {{volumeSource: {{hostPath: {{path: {data}}}}}}}\n"
        "  output: {image: ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1, imagePushSecret: SECRET_HERE}\n",
        encoding="utf-8",
    )
    return file


def test_command_previews_a_manifest_that_still_has_placeholders_for_its_output(
    without_weights: ModelSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = [{"role": "user", "content": "\x1b[31mred?"}, {"role": "assistant", "content": "blue"}]
    data = tmp_path / "data" / "nested"
    data.mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist([{"id\x1b": 1, "messages": turns}, {"messages": []}]),
        data / "a.parquet_download",
    )
    file = write_manifest(tmp_path, tmp_path / "data")
    arguments = ["tune", str(file), "--set", f"model.path={without_weights.path}", "--preview", "2"]
    assert main.run(arguments, {}) == 3  # a bad row is an error, as in training
    assert "row 2 column 'messages'" in capsys.readouterr().err
    assert main.run([*arguments, "--on-bad-row", "skip"], {}) == 0
    output = capsys.readouterr().out
    assert "user\n␛[31mred?<|im_end|>" in output
    assert "⟦blue<|im_end|>⟧" in output
    assert "1 to train on, 0 held out, 1 skipped as bad" in output
    assert "columns  messages from messages (1 row)\nunused   columns id␛\n" in output
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main.run([*arguments, "--on-bad-row", "skip"], {}) == 0
    assert "\x1b[32mblue<|im_end|>\x1b[0m" in capsys.readouterr().out
    assert main.run([*arguments, "--on-bad-row", "ignore"], {}) == 2
    assert "on_bad_row" in capsys.readouterr().err


def test_rows_that_the_template_refuses_are_skipped_and_not_counted_to_train_on(
    make_job: Maker, without_weights: ModelSource, tmp_path: Path
) -> None:
    assert without_weights.path
    template = without_weights.path / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = {"role": "system", "content": "s"}
    rows = [{"messages": turns}, {"messages": turns}, {"messages": [system, *turns]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = make_job(model=without_weights)
    data = job.data.model_copy(update={"file": tmp_path / "rows.jsonl", "on_bad_row": "skip"})
    found = preview(job.model_copy(update={"data": data}), count=3)
    assert (found.train_rows, found.counted, found.data.skipped) == (2, 2, 1)


STRIPPED_THOUGHT = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '### U:' + m.content }}"
    "{% else %}{{ '### A:' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### A:<think>\n' }}{% endif %}"
)
ORDER = {"id": "1", "type": "function", "function": {"name": "get_order", "arguments": {"id": 7}}}


def turns(*contents: str) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    )


@pytest.mark.parametrize(
    ("family", "template", "example", "shown"),
    [
        (
            "chatml", None, Example(turns("chatml?", "It ends turns with <|im_end|>, begins <|im_start|>.")),
            ["<|im_start|>user\nchatml?<|im_end|>\n<|im_start|>assistant\n"
             "⟦It ends turns with <|im_end|>, begins <|im_start|>.<|im_end|>⟧"],
        ),
        (
            "chatml", STRIPPED_THOUGHT, Example(turns("Great film", "positive")),
            ["<s>### U:Great film### A:<think>\n⟦\n</think>\n\npositive<|im_end|>⟧"],
        ),
        (
            "chatml", STRIPPED_THOUGHT, Example(turns("2+2?", "<think>\nadd them\n</think>\n\n4")),
            ["<s>### U:2+2?### A:<think>\n⟦add them\n</think>\n\n4<|im_end|>⟧"],
        ),
        (
            "generation blocks", None, Example(turns("a", "one", "b", "two")),
            ["<|im_start|>user\na<|im_end|><|im_start|>assistant\n⟦one<|im_end|>⟧"
             "<|im_start|>user\nb<|im_end|><|im_start|>assistant\n⟦two<|im_end|>⟧"],
        ),
        (
            "harmony", None, Example(turns("hi", "hello", "more", "yes")),
            ["<|start|>user<|message|>hi<|end|><|start|>assistant"
             "⟦<|channel|>final<|message|>hello<|return|>⟧",
             "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>hello<|end|>"
             "<|start|>user<|message|>more<|end|><|start|>assistant"
             "⟦<|channel|>final<|message|>yes<|return|>⟧"],
        ),
        (
            "qwen3", None, Example(turns("a", "<think>\nlong\n</think>\n\nfour", "b", "five")),
            ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\nlong\n</think>\n\nfour<|im_end|>⟧",
             "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
             "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nfive<|im_end|>⟧"],
        ),
        (
            "llama 3", None,
            Example(
                (
                    {"role": "user", "content": "where?"},
                    {"role": "assistant", "content": None, "tool_calls": [ORDER]},
                    {"role": "tool", "content": "sent", "tool_call_id": "1"},
                    {"role": "assistant", "content": "It is sent."},
                )
            ),
            ["<s><|start_header_id|>user<|end_header_id|>\n\nwhere?<|eot_id|>"
             "<|start_header_id|>assistant<|end_header_id|>\n\n"
             '⟦{"name": "get_order", "parameters": {"id": 7}}<|eot_id|>⟧'
             "<|start_header_id|>ipython<|end_header_id|>\n\nsent<|eot_id|>"
             "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is sent.<|eot_id|>⟧"],
        ),
        (
            "chatml", None, Example(turns("a", "BAD", "b", "GOOD"), untrained=frozenset({1})),
            ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nBAD<|im_end|>\n"
             "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦GOOD<|im_end|>⟧"],
        ),
    ],
    ids=["special in answer", "no thought", "thought", "blocks", "harmony", "qwen3", "calls", "weight 0"],
)  # fmt: skip
def test_template_cases_are_shown_as_they_are_trained(
    family: str, template: str | None, example: Example, shown: list[str]
) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    encoded = Encoder(tokenizer, Encoding(), max_tokens=2048).encode(example)
    texts = [
        "".join(f"⟦{run.text}⟧" if run.labelled else run.text for run in runs(sequence, tokenizer))
        for sequence in encoded.sequences
    ]
    assert texts == shown


def test_special_tokens_that_were_added_are_trained_through() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<scratch>", "</scratch>"]})
    example = Example(turns("hi", "<scratch>so</scratch>it is 4"))
    (sequence,) = Encoder(tokenizer, Encoding(), max_tokens=2048).encode(example).sequences
    assert runs(sequence, tokenizer)[-1].text == "<scratch>so</scratch>it is 4<|im_end|>"


# Four data sets as people have them.

PLAIN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "order_status",
        "description": "Look up an order",
        "parameters": {"type": "object", "properties": {"order_id": {"type": "string"}}},
    },
}
CALL = '<tool_call>{"name": "order_status", "arguments": {"order_id": "B1"}}</tool_call><|im_end|>'


def tickets(folder: Path) -> None:
    row = {
        "ticket_id": 1000,
        "question": "My router shows E12",
        "answer": "Unplug it.",
        "created": "2026-01-10",
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "tickets.parquet")


def alpaca(folder: Path) -> None:
    with (folder / "alpaca.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        writer.writerow(["Summarise.", "It's number 5,\nplease help", "1. Stopped\n2. Working"])


def sharegpt(folder: Path) -> None:
    said = [
        ("system", "Be brief."),
        ("human", "It hums"),
        ("gpt", "T6."),
        ("human", "Else?"),
        ("gpt", "Write."),
    ]
    row = {"id": "c0", "conversations": [{"from": who, "value": text} for who, text in said]}
    (folder / "sharegpt.json").write_text(json.dumps([row], indent=1), encoding="utf-8")


def tools(folder: Path) -> None:
    function = {"name": "order_status", "arguments": json.dumps({"order_id": "B1"})}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are the order desk."},
        {"role": "user", "content": "Where is B1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "name": "order_status", "content": '{"city": "Oslo"}'},
        {"role": "assistant", "content": "In Oslo."},
    ]
    (folder / "tools.jsonl").write_text(json.dumps({"messages": messages, "tools": [TOOL]}) + "\n")


def look(folder: Path, model: Path, template: str, make: Callable[[Path], None]) -> Preview:
    make(folder)
    source = ModelSource(name="tiny", path=model, chat_template=template)
    return preview(TuningJob(name="look", model=source, data=DataSource(folder=folder)), count=1)


@pytest.mark.parametrize(
    ("make", "columns", "trained"),
    [
        (tickets, "question from question, answer from answer", ["Unplug it.<|im_end|>"]),
        (
            alpaca,
            "question from instruction + input, answer from output",
            ["1. Stopped\n2. Working<|im_end|>"],
        ),
        (sharegpt, "messages from conversations", ["T6.<|im_end|>", "Write.<|im_end|>"]),
        (tools, "messages from messages, tools from tools", [CALL, "In Oslo.<|im_end|>"]),
    ],
)
def test_data_of_people_previews_right_with_a_template_that_has_tools(
    tiny_llama_dir: Path, tmp_path: Path, make: Callable[[Path], None], columns: str, trained: list[str]
) -> None:
    found = look(tmp_path, tiny_llama_dir, CHATML_WITH_TOOLS, make)
    assert [str(used) for used in found.data.facts.columns] == [columns]
    (sequence,) = found.examples[0].sequences
    assert [run.text for run in sequence if run.labelled] == trained
    text = "".join(run.text for run in sequence)
    assert ("Tools: " in text) == (make is tools)
    if make is tools:
        assert '{"city": "Oslo"}' in text
        with pytest.raises(
            DataError, match=r"tools\.jsonl: row 1: the chat template of tiny does not render tools"
        ):
            look(tmp_path, tiny_llama_dir, PLAIN_CHATML, make)


def test_turn_of_weight_0_is_shown_and_not_trained(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def weighted(folder: Path) -> None:
        turns = [("user", "a", None), ("assistant", "BAD", 0), ("user", "b", None), ("assistant", "GOOD", 1)]
        messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
        (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}))

    (sequence,) = look(tmp_path, tiny_llama_dir, PLAIN_CHATML, weighted).examples[0].sequences
    assert [run.text for run in sequence if run.labelled] == ["GOOD<|im_end|>"]
    assert "BAD" in "".join(run.text for run in sequence)
