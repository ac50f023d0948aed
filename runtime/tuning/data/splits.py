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
"""Words beside a split's that say no more than it does: `train_data`, `split=train`, `test-0-of-3`."""
_KINDS = frozenset(
    ("sft", "pref", "prefs", "preference", "preferences", "gen", "dpo", "kto", "ppo", "rl", "rm", "reward")
)
"""Words for what rows are to train, as in the splits of the zephyr data sets: `train_sft`, `train_prefs`."""


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


def training_kinds(names: Sequence[PurePath]) -> list[str]:
    """Return the splits among `names` that tell a way of training: train_sft, train_prefs."""
    parts = (part for name in names for part in map(_meaningful, _parts(name)))
    return sorted(
        {
            f"{part[0]}_{part[1]}"
            for part in parts
            if len(part) == 2 and WORDS.get(part[0]) == "train" and part[1] in _KINDS
        }
    )


def _told(name: PurePath) -> tuple[Split | None, bool]:
    """Return the split that a name tells, and whether it tells nothing else.

    The file's name goes before its folders', the nearest first; one that tells nothing else before all.
    """
    told = [_told_by(_meaningful(part)) for part in _parts(name)]
    telling = [(split, alone) for split, alone in told if split is not None]
    return next((found for found in telling if found[1]), telling[0] if telling else (None, False))


def _told_by(words: Sequence[str]) -> tuple[Split | None, bool]:
    split = next((WORDS[word] for word in (*words[:1], *words[-1:]) if word in WORDS), None)
    return split, len(words) == 1


def _parts(name: PurePath) -> list[str]:
    """Return the name of a file without its suffixes, then those of its folders, the nearest first."""
    return [base_name(name), *reversed(name.parts[:-1])]


def _meaningful(part: str) -> list[str]:
    """Return the words of a name but the fillers: ["test"] of "split=test" and "test-00000-of-00003"."""
    return [word for word in re.split(r"[^a-z]+", part.lower()) if word and word not in _FILLERS]
