"""The log probabilities of a prompt's own tokens, as the passes over it leave them.

Each pass has the device pack those of its tokens, and the host reads them all when the prompt is done. `C`
rows that a token is chosen for, `S` that are scored, behind them. Does not know sampling. Start at `divide`,
then `PromptScores.read`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.serving.engine.protocol import Token
from runtime.serving.engine.sampling import with_logprobs
from runtime.serving.engine.scheduler import PromptChunk
from runtime.transfers import HostCopy, to_device


class PromptScores:
    """What is known of one prompt's tokens."""

    def __init__(self, prompt_ids: tuple[int, ...], alternatives: int) -> None:
        self.alternatives = alternatives
        """Reported per token."""
        self._ids = prompt_ids
        self._parts: list[HostCopy] = []

    def add(self, packed: Tensor) -> None:
        """Take what `with_logprobs` has of the next tokens."""
        self._parts.append(HostCopy(packed))

    def clear(self) -> None:
        """Forget everything: the prompt is run again."""
        self._parts.clear()

    def read(self) -> tuple[Token, ...] | None:
        """Return the prompt's tokens, the first without a log probability; None where one is NaN."""
        tokens = [Token(self._ids[0])]
        for part in self._parts:
            for code, logprob, *rest in part.read().tolist():
                most = len(rest) // 2
                ids, logprobs = map(int, rest[: min(self.alternatives, most)]), rest[most:]
                tokens.append(Token(int(code), logprob=logprob, top=tuple(zip(ids, logprobs, strict=False))))
        return None if any(math.isnan(token.logprob or 0) for token in tokens) else tuple(tokens)


@torch.inference_mode()
def pack(following: Sequence[int], logits: Tensor, *, alternatives: int) -> Tensor:
    """Return what `with_logprobs` does of the tokens that follow those of logits (S, V)."""
    return with_logprobs(to_device(torch.tensor(following), logits.device), logits.float(), alternatives)


@torch.inference_mode()
def divide(
    logits: Tensor, chunks: Sequence[PromptChunk], *, alternatives: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return logits (C, V) of (C + S, V), and for each of `chunks` what is packed of its part of S."""
    following = [chunk.sequence.ids[position + 1] for chunk in chunks for position in chunk.scored]
    chosen = len(logits) - len(following)
    packed = pack(following, logits[chosen:], alternatives=alternatives)
    # a copy, so that the memory of all of them is free again
    return logits[:chosen].clone(), torch.split(packed, [len(chunk.scored) for chunk in chunks])
