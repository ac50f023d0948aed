"""A request while an engine answers it, and the token that ends it.

Does not know models or steps. Start at `RunningRequest`.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from runtime.serving.engine.prompt_scores import PromptScores, divide
from runtime.serving.engine.protocol import Token
from runtime.serving.engine.request_queue import RequestHandle
from runtime.serving.engine.sampler import Sampler
from runtime.serving.engine.scheduler import Sequence, StepPlan


class RunningRequest:
    """A request being answered: its handle, its sequence in the cache, its sampler, its prompt's scores."""

    __slots__ = ("handle", "sampler", "scores", "sequence")

    def __init__(self, handle: RequestHandle, sequence: Sequence) -> None:
        self.handle, self.sequence = handle, sequence
        request = handle.request
        self.sampler = Sampler(request.sampling, request.prompt_ids)
        self.scores = PromptScores(request.prompt_ids, request.sampling.top_logprobs or 0)

    def note_scores(self) -> bool:
        """Post the prompt's log probabilities with the first token, where they are wanted; False for NaN."""
        if self.handle.request.sampling.prompt_logprobs:
            tokens = self.scores.read()
            if tokens is None:
                return False
            self.handle.note_prompt(tokens)
        return True


def keep_scores(running: Mapping[Sequence, RunningRequest], plan: StepPlan, logits: Tensor) -> Tensor:
    """Keep what `plan` scores by its logits (C + S, V); return those (C, V) of the tokens to choose."""
    chunks = [chunk for chunk in plan.chunks if chunk.scored]
    if not chunks:
        return logits
    scores = [running[chunk.sequence].scores for chunk in chunks]
    logits, parts = divide(logits, chunks, alternatives=max(each.alternatives for each in scores))
    for each, part in zip(scores, parts, strict=True):
        each.add(part)
    return logits


def ended_by(token: Token) -> Token:
    """Return the end of an answer whose next `token` is a stop id, with what is known of that."""
    return replace(token, id=None, finish_reason="stop", stop_id=token.id)
