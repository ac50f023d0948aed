"""Variables that a shell dropped, found with the processes above."""

from pathlib import Path

from runtime.pod import parent_environ


def test_strength_that_a_shell_dropped_is_found_in_a_parent_process(tmp_path: Path) -> None:
    proc = tmp_path
    for pid, parent, block in (
        (30, 20, b"A=1"),
        (20, 1, b"my-lora.v2=0.5\0B=2"),
        (1, 0, b"my-lora.v2=0.9\0other=3"),
    ):
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "environ").write_bytes(block)
        (proc / str(pid) / "stat").write_text(f"{pid} (a) b (sh) S {parent} 1 1")
    restored = parent_environ.restore({"C": "3"}, ["my-lora.v2", "other", "absent"], pid=30, proc=proc)
    assert restored == {"C": "3", "my-lora.v2": "0.5", "other": "3"}
    assert parent_environ.restore({"other": "mine"}, ["other"], pid=30, proc=proc) == {"other": "mine"}
