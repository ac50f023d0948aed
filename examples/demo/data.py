"""Writes the demo's parquet from facts.toml: 210 rows of (system, user, assistant) messages.

The same bytes at every run. `python examples/demo/data.py FILE` writes it; `probes()` lists the ten
questions that `demo.py` asks of the base and of the tuned model.
"""

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.toml")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question, the words that a right answer holds, and whether no training row asks it so."""

    question: str
    holds: str
    reworded: bool

    def answered_by(self, text: str) -> bool:
        """Return whether `text` holds the fact, upper or lower case."""
        return self.holds.lower() in text.lower()


def rows() -> list[dict[str, list[dict[str, str]]]]:
    """Return the training rows; facts take turns, so that a batch holds different ones."""
    knowledge = _read()
    systems, openings = knowledge["systems"], knowledge["openings"]
    made = []
    for way in range(len(knowledge["facts"][0]["questions"])):
        for opening in openings:
            for number, fact in enumerate(knowledge["facts"]):
                question = fact["questions"][way]
                answers = fact["answers"]
                made.append(
                    {
                        "messages": [
                            {"role": "system", "content": systems[(way + number) % len(systems)]},
                            {"role": "user", "content": opening + question},
                            {"role": "assistant", "content": answers[(way + len(opening)) % len(answers)]},
                        ]
                    }
                )
    return made


def probes() -> list[Probe]:
    """Return the ten questions of the demo, five of them in words that no training row uses."""
    return [
        Probe(fact["probe"], fact["holds"], fact["reworded"]) for fact in _read()["facts"] if "probe" in fact
    ]


def write(path: Path) -> None:
    """Write the rows to `path` as parquet; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows()), aside)
    aside.replace(path)


def _read() -> dict[str, Any]:
    return tomllib.loads(FACTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
