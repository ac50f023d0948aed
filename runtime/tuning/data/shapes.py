"""The shapes of rows that data has: one table of the names of their columns.

Names alone: which of them a row is made of is columns.py's choice, what is in them content.py's.
Start at `PAIRS`.
"""

from dataclasses import dataclass

MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents")
TEXT = "text"
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction")
HISTORY = ("history",)
TOOLS = ("tools", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking", "complex_cot")
CHOSEN = "chosen"
"""The better of two answers in preference data, which is trained on where there is no other answer."""
REJECTED = "rejected"
LABELS = ("label", "labels", "category", "sentiment", "intent", "summary")
"""What a classifier, or a model that sums up, answers to a text."""
MARKS = ("label", "labels", "desirable", "kto_tag")
"""Where data with good and bad answers says which an answer is."""
BAD = ("false", "0", "0.0")
CHOICES = ("choices", "options")
LETTERS = ("a", "b")
"""Columns of a multiple choice that has one for each."""
WRAPPERS = ("row", "data", "body", "json")
"""Names under which exports, OpenAI's batches and WebDataset put a row beside its own facts."""
ANNOTATED = ("annotations", "predictions")
"""Beside `data` these are the answers (Label Studio)."""
MEDIA = ("images", "image", "audios", "audio", "videos", "video")
REFUSED = ("chat_template_kwargs",)


@dataclass(frozen=True, slots=True)
class PairShape:
    """Columns of a question, of what may be put under it, and of its answer."""

    question: str
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    """The first that is filled counts."""


PAIRS = (
    PairShape("instruction", ("input", "context"), ("output", "response", "answer", "completion", CHOSEN)),
    PairShape("prompt", (), ("completion", "response", "answer", "output", CHOSEN)),
    PairShape(
        "question",
        ("context", "passage", "article"),
        ("answer", "response", "output", "answers", "completion", CHOSEN),
    ),
    PairShape("query", ("context",), ("response", "answer", "output", "answers", "completion")),
    PairShape("problem", (), ("solution", "answer", "response", "output")),
    PairShape("inputs", (), ("targets", "outputs")),
    PairShape("input", (), ("output", "response", "answer", "completion", "target", CHOSEN)),
    PairShape("user", (), ("assistant",)),
)
"""In the order in which they are looked for."""

ANSWERS = tuple(dict.fromkeys(name for pair in PAIRS for name in pair.answers))
"""Every name of an answer, in the order in which they are looked for beside messages."""
