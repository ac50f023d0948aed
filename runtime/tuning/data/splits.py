"""Which files of a data set are to train on, to hold out, and to leave out, by their names.

Hugging Face's words, in a file's or a folder's name. Knows names, not contents. Start at `assign`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Literal

from runtime.tuning.data.formats import base_name

Split = Literal["train", "validation", "test"]

WORDS: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
_FILLERS = frozenset(("data", "set", "dataset", "split", "part", "file", "rows", "of"))
"""Words beside a split's that say no more than it does: `train_data`, `test-00000-of-00003`."""


def assign(names: Sequence[PurePath]) -> list[Split]:
    """Return the split of each file, by its name below the data folder.

    A name that only begins or ends with a split's word (`test-driven.jsonl`) counts where another file's says
    train. Without any file to train on the words mean nothing: all are.
    """
    told = [_told(name) for name in names]
    has_train = any(split == "train" for split, _ in told)
    found: list[Split] = [
        split if split is not None and (alone or has_train) else "train" for split, alone in told
    ]
    return found if "train" in found else ["train"] * len(found)


def named(word: str) -> Split:
    """Return the split that a data set calls `word`, such as "train_sft"; "train" for words of its own."""
    first = re.split(r"[^a-z]+", word.lower())[0]
    return WORDS.get(first, "train")


def _told(name: PurePath) -> tuple[Split | None, bool]:
    """Return the split that a name tells, and whether it tells nothing else."""
    words = [word for word in re.split(r"[^a-z]+", base_name(name).lower()) if word]
    meaningful = [word for word in words if word not in _FILLERS]
    for word in (*meaningful[:1], *meaningful[-1:]):
        if word in WORDS:
            return WORDS[word], len(meaningful) == 1
    folders = [WORDS[part.lower()] for part in name.parts[:-1] if part.lower() in WORDS]
    return (folders[-1], True) if folders else (None, False)
