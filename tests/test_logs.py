"""Log lines: JSON off a terminal, secrets cut out of messages, fields and tracebacks."""

import io
import json
import logging

from runtime import logs


def test_each_record_is_one_json_line_with_its_fields() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    logging.getLogger("runtime.x").info("step %d\nof many", 3, extra={"fields": {"loss": 0.5}})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["msg"], record["loss"], record["level"]) == ("step 3\nof many", 0.5, "info")


def test_tracebacks_are_redacted_too() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    try:
        raise ValueError("https://host/x?sig=SECRET")
    except ValueError:
        logging.getLogger("runtime.x").exception("failed")
    assert "SECRET" not in stream.getvalue()
    assert "traceback" in json.loads(stream.getvalue())


def test_a_terminal_gets_plain_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    logs.configure(stream=stream)
    logging.getLogger("runtime.x").warning("disk is nearly full")
    assert stream.getvalue().rstrip().endswith("WARNING disk is nearly full")


ODD = (*map(chr, range(0xA0)), *"\x7f\u2028\u2029\u202e\u2066\u2069\ud800")


def test_no_log_line_controls_a_terminal_or_ends_early_and_json_keeps_what_was_said() -> None:
    """C1 has one-byte forms of CSI and OSC, bidirectional controls show other text than there is."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = "日本 é \u200f" + "".join(ODD)
    for stream in (io.StringIO(), Terminal()):
        logs.configure(stream=stream)
        logging.getLogger("runtime.x").info("%s", said, extra={"fields": {said: [said]}})
        written = stream.getvalue().removesuffix("\n")
        written.encode()  # to any stream
        assert "日本 é \u200f" in written
        assert set(ODD) & set(written) <= {*map(chr, range(0x20, 0x7F)), *("\t\n" if stream.isatty() else "")}
        if not stream.isatty():
            record = json.loads(written)
            assert (record["msg"], record[said]) == (said, [said])


def test_ranks_above_zero_only_warn() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream, rank=1)
    logging.getLogger("runtime.x").info("loaded")
    logging.getLogger("runtime.x").warning("odd")
    assert [json.loads(line)["msg"] for line in stream.getvalue().splitlines()] == ["odd"]


def test_a_count_has_its_noun_in_the_right_number() -> None:
    assert [logs.counted(n, "file") for n in (0, 1, 2, 1000)] == [
        "0 files",
        "1 file",
        "2 files",
        "1,000 files",
    ]
    assert logs.counted(2, "process", "processes") == "2 processes"
