"""How the next tokens of a step are chosen: for all its rows at once, on the device of the logits.

The order is that of transformers' generate: penalties and bias, bans, then temperature, then truncation.
What is worked out on the host, constraints and bans by what came before (sampler.py), comes as a mask or as
ids. One copy to the host a step has the tokens; a second one where a row needs more than truncation's
shortlist. A row is the same alone and among others. `C` rows, `V` the vocabulary. Does not know models. Start
at `TokenChooser.choose`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.serving.engine.row_settings import DrawSettings, RowSettings, flat_indices
from runtime.serving.engine.sampler import Choice, Row
from runtime.serving.engine.truncation import SHORTLIST, UNDECIDED, draw, rank
from runtime.transfers import to_device

NOT_FINITE, NONE_LEFT = -1, -2
"""Stand for a token where the logits are not finite, and where the request allows none."""
FULL_RANKINGS = 32
"""Tokens of an answer for which the whole vocabulary is ranked at once after its shortlist was too short."""
SMALLEST_PENALTY = 1e-30
"""Repetition penalties below this would be 0 in float32, or make infinities of logits."""


class TokenChooser:
    """Chooses the tokens of a step, and keeps its rows' settings for the next one with the same rows."""

    def __init__(self) -> None:
        self._settings: RowSettings | None = None

    @torch.inference_mode()
    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
        """Return what is chosen for each of `rows` by its logits (C, V)."""
        choices = _read(self.enqueue(logits, rows), rows)
        again = [n for n, choice in enumerate(choices) if choice.token == UNDECIDED]
        if again:
            for n in again:
                rows[n].sampler.full_rankings = FULL_RANKINGS
            index = to_device(torch.tensor(again), logits.device)
            found = self.choose(logits.index_select(0, index), [rows[n] for n in again])
            for n, choice in zip(again, found, strict=True):
                choices[n] = choice
        return choices

    def enqueue(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Have the device of logits (C, V) choose, without waiting for it; what it returns `_read` reads.

        (C,) int64, a token or what stands for one; with log probabilities (C, columns) float64.
        """
        highest, likeliest = logits.max(dim=-1)  # NaN or Inf anywhere in a row shows here
        if all(row.is_plain for row in rows):
            return torch.where(highest.isfinite(), likeliest, NOT_FINITE)
        settings = self._settings
        if settings is None or not settings.are_of(rows):
            settings = self._settings = RowSettings(rows, logits.shape[1], logits.device)
        logits = logits.float()
        scores = _adjusted(logits, rows, settings)
        best, chosen = (highest.float(), likeliest) if scores is logits else scores.max(dim=-1)
        left = best > -torch.inf
        for how in settings.draws:
            chosen = _put(chosen, how.index, _draw(scores, best, how, rows))
        chosen = torch.where(left, chosen, NONE_LEFT)
        chosen = torch.where(highest.isfinite(), chosen, NOT_FINITE)
        if settings.alternatives is None:
            return chosen
        return _with_logprobs(chosen, logits, settings.alternatives)


def _read(packed: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Return what `TokenChooser.enqueue` chose: the one copy to the host."""
    values = packed.cpu().tolist()
    if packed.dim() == 1:
        return [_choice(code) for code in values]
    choices = []
    for (code, logprob, *rest), row in zip(values, rows, strict=True):
        wanted, most = row.sampler.sampling.top_logprobs, len(rest) // 2
        if wanted is None:
            choices.append(_choice(int(code)))
            continue
        ids, logprobs = map(int, rest[: min(wanted, most)]), rest[most:]
        choices.append(_choice(int(code), logprob, tuple(zip(ids, logprobs, strict=False))))
    return choices


def _choice(code: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> Choice:
    chosen = None if code in (NOT_FINITE, NONE_LEFT) else code
    return Choice(chosen, finite=code != NOT_FINITE, logprob=logprob, top=top)


def _adjusted(scores: Tensor, rows: Sequence[Row], settings: RowSettings) -> Tensor:
    """Return `scores` (C, V) with penalties, bias and bans; they are not changed themselves."""
    device, vocabulary = scores.device, scores.shape[1]
    if settings.penalties is not None:
        scores = penalise(scores, *settings.penalties.entries(rows))
    if settings.bias is not None:
        scores = scores.flatten().index_add(0, *settings.bias).view_as(scores)
    equal = [n for n, row in enumerate(rows) if row.bans.equal]
    if equal:
        scores = scores.index_fill(0, to_device(torch.tensor(equal), device), 0.0)
    banned = [(n, ids) for n, row in enumerate(rows) for ids in row.bans.banned]
    flat = flat_indices(banned, vocabulary, device)
    if flat is not None:
        scores = scores.flatten().index_fill(0, flat, -torch.inf).view_as(scores)
    masked = [n for n, row in enumerate(rows) if row.mask is not None or row.bans.only]
    if masked:
        index = to_device(torch.tensor(masked), device)
        keep = to_device(torch.stack([_allowed(rows[n], vocabulary) for n in masked]), device)
        part = scores.index_select(0, index).masked_fill(~keep, -torch.inf)
        scores = scores.index_copy(0, index, part)
    return scores


def _allowed(row: Row, vocabulary: int) -> Tensor:
    """Return which tokens (V,) a row's constraint and its bans by `only` leave."""
    keep = torch.ones(vocabulary, dtype=torch.bool)
    if row.mask is not None:
        known = torch.frombuffer(bytearray(row.mask), dtype=torch.uint8)[:vocabulary]
        keep.zero_()[: known.shape[0]] = known != 0
    for ids in row.bans.only:
        keep &= torch.zeros_like(keep).index_fill_(0, ids[(ids >= 0) & (ids < vocabulary)], value=True)
    return keep


def penalise(scores: Tensor, flat: Tensor, counts: Tensor, factors: Tensor) -> Tensor:
    """Return `scores` (C, V) with tokens made less likely that came before: see `Penalties.entries`.

    Repetition as in CTRL (arXiv:1909.05858, section 4.1), of prompt and answer; presence and frequency as at
    OpenAI, of the answer.
    """
    flattened = scores.flatten()
    values = flattened.index_select(0, flat)
    repetition, presence, frequency = factors
    repetition, most = repetition.clamp(min=SMALLEST_PENALTY), torch.finfo(values.dtype).max
    penalised = torch.where(values < 0, values * repetition, values / repetition).clamp_(-most, most)
    penalised = torch.where(values.isinf(), values, penalised)
    penalised = penalised - (presence * (counts > 0) + frequency * counts)
    return flattened.index_copy(0, flat, penalised).view_as(scores)


def _draw(scores: Tensor, best: Tensor, how: DrawSettings, rows: Sequence[Row]) -> Tensor:
    """Return the tokens (n,) drawn for the rows of `how`; scores (C, V), the highest are `best` (C,)."""
    below = _part(scores, how.index) - _part(best, how.index).unsqueeze(1)
    # below the best one: divided by a small temperature, the scores themselves would overflow
    scaled = below.div_(how.temperature)
    return draw(scaled, how.cut, how.uniform(rows, scores.device), most=how.most)


def _with_logprobs(chosen: Tensor, logits: Tensor, alternatives: int) -> Tensor:
    """Return (C, 2 + 2 alternatives) float64: tokens, their log probabilities, likeliest ids, theirs."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, chosen.clamp(min=0).unsqueeze(1))
    values, ids = rank(logprobs, SHORTLIST)  # more than are reported: of equals those with the lowest ids
    columns = (chosen.unsqueeze(1), own, ids[:, :alternatives], values[:, :alternatives])
    return torch.cat([column.double() for column in columns], 1)


def _part(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _put(tensor: Tensor, index: Tensor | None, part: Tensor) -> Tensor:
    return part if index is None else tensor.index_copy(0, index, part)
