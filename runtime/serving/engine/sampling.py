"""How the next tokens of a step are chosen: for all its rows at once, on the device of the logits.

The order is that of transformers' generate: penalties and bias, bans, then temperature, then truncation.
What is worked out on the host, constraints and bans by what came before (sampler.py), comes as a mask or as
ids. One copy to the host a step has the tokens; a second one where a row needs more than truncation's
shortlist. The host need not wait for it: `Chosen`. A row is the same alone and among others. `C` rows, `V`
the vocabulary. Does not know models. Start at `TokenChooser.choose`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from runtime.serving.engine.row_settings import DrawSettings, RowSettings, flat_indices
from runtime.serving.engine.sampler import Choice, Row
from runtime.serving.engine.truncation import SHORTLIST, UNDECIDED, draw, rank
from runtime.transfers import HostCopy, to_device

NOT_FINITE, NONE_LEFT = -1, -2
"""Stand for a token where the logits are not finite, and where the request allows none."""
FULL_RANKINGS = 32
"""Tokens of an answer for which the whole vocabulary is ranked at once after its shortlist was too short."""
SMALLEST_PENALTY = 1e-30
"""Repetition penalties below this would be 0 in float32, or make infinities of logits."""


class Chosen:
    """The tokens of a step, chosen on the device; on their way to the host, which reads them when it must."""

    def __init__(self, packed: Tensor, logits: Tensor, rows: Sequence[Row], *, decided: bool) -> None:
        """`packed` (C,) int64 has a token for each row, or what stands for one.

        With log probabilities it is (C, columns) float64. Where it is not `decided` that the shortlist was
        enough, `logits` (C, V) are needed once more.
        """
        self.logits, self.rows = logits, rows
        self._packed, self._decided = packed, decided
        self._copy = HostCopy(packed)

    @property
    def tokens(self) -> Tensor:
        """The tokens (C,) int64 on the device; 0 for a row without one."""
        tokens = self._packed if self._packed.dim() == 1 else self._packed[:, 0].long()
        return tokens.clamp(min=0)

    def keep(self, logits: Tensor) -> None:
        """Stay right while the memory of `logits`, which the model returned, takes those of other steps."""
        if self._decided:
            self.logits = logits.new_empty(0)
        elif self.logits.data_ptr() == logits.data_ptr():
            self.logits = logits.clone()

    def read(self) -> list[Choice]:
        """Return the choices, as the one copy to the host has them: some may be UNDECIDED."""
        return _read(self._copy.read(), self.rows)


class TokenChooser:
    """Chooses the tokens of a step, and keeps its rows' settings for the next one with the same rows."""

    def __init__(self) -> None:
        self._settings: RowSettings | None = None

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
        """Return what is chosen for each of `rows` by its logits (C, V)."""
        return self.finish(self.enqueue(logits, rows))

    @torch.inference_mode()
    def finish(self, chosen: Chosen) -> list[Choice]:
        """Wait for what was chosen, and rank all of the vocabulary where a row needs it."""
        choices, rows = chosen.read(), chosen.rows
        again = [n for n, choice in enumerate(choices) if choice.token == UNDECIDED]
        if again:
            for n in again:
                rows[n].sampler.full_rankings = FULL_RANKINGS
            index = to_device(torch.tensor(again), chosen.logits.device)
            found = self.choose(chosen.logits.index_select(0, index), [rows[n] for n in again])
            for n, choice in zip(again, found, strict=True):
                choices[n] = replace(choice, again=True)
        return choices

    @torch.inference_mode()
    def enqueue(self, logits: Tensor, rows: Sequence[Row]) -> Chosen:
        """Have the device of logits (C, V) choose, without waiting for it."""
        highest, likeliest = logits.max(dim=-1)  # NaN or Inf anywhere in a row shows here
        if all(row.is_plain for row in rows):
            plain = torch.where(highest.isfinite(), likeliest, NOT_FINITE)
            return Chosen(plain, logits, rows, decided=True)
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
        if settings.alternatives is not None:
            chosen = with_logprobs(chosen, logits, settings.alternatives)
        decided = all(how.most in (0, logits.shape[1]) for how in settings.draws)
        return Chosen(chosen, logits, rows, decided=decided)


def _read(packed: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Return the choices that `packed`, on the host, stands for."""
    values = packed.tolist()
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


def with_logprobs(chosen: Tensor, logits: Tensor, alternatives: int) -> Tensor:
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
