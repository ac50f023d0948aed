"""Choosing the tokens of a step: the formulas of the penalties, log probabilities, and rows beside others."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.serving.engine.penalties import ROOM
from runtime.serving.engine.protocol import Constraint, Grammar, Sampling, Token
from runtime.serving.engine.sampler import Choice, Sampler
from runtime.serving.engine.sampling import TokenChooser, _adjusted
from tests.serving.engine.plain_sampling import adjust, distribution

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])


def choose(sampler: Sampler, logits: Tensor = LOGITS) -> Token:
    """Return the next token of one row by itself."""
    return step([sampler], logits.unsqueeze(0))[0]


def step(samplers: list[Sampler], logits: Tensor, by: TokenChooser | None = None) -> list[Token]:
    """Return the next tokens of several rows, chosen in one step; logits (C, V)."""
    rows = [sampler.row() for sampler in samplers]
    choices = (by or TokenChooser()).choose(logits, rows)
    return [sampler.take(*each) for sampler, *each in zip(samplers, rows, choices, strict=True)]


def test_repetition_divides_positive_and_multiplies_negative_logits() -> None:
    sampler = Sampler(Sampling(1, repetition_penalty=2.0), (0, 3, 3))
    assert adjusted(sampler, LOGITS).tolist() == [1.0, 1.0, 0.5, -2.0, 0.0]


def adjusted(sampler: Sampler, logits: Tensor) -> Tensor:
    by, rows = TokenChooser(), [sampler.row()]
    by.choose(logits.unsqueeze(0), rows)
    assert by._settings is not None
    return _adjusted(logits.unsqueeze(0), rows, by._settings)[0]


def test_presence_and_frequency_count_generated_tokens_not_the_prompt() -> None:
    sampler = Sampler(Sampling(9, presence_penalty=0.6, frequency_penalty=0.5), (0, 0, 0))
    by = TokenChooser()
    assert [step([sampler], LOGITS.unsqueeze(0), by)[0].id for _ in range(3)] == [0, 1, 0]


def test_a_bias_of_a_hundred_decides_the_token() -> None:
    assert choose(Sampler(Sampling(1, logit_bias={3: 100.0}), (0,))).id == 3


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    token = choose(Sampler(Sampling(1, temperature=0.3, top_k=1, top_logprobs=2), (0,)))
    expected = LOGITS.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[0]))
    assert [index for index, _ in token.top] == [0, 1]
    assert token.top[1][1] == pytest.approx(float(expected[1]))


def test_each_row_reports_as_many_alternatives_as_it_asks_for() -> None:
    wanted = [None, 0, 3, 20]
    samplers = [Sampler(Sampling(1, top_logprobs=count), (0,)) for count in wanted]
    tokens = step(samplers, LOGITS.expand(4, -1).contiguous())
    assert [len(token.top) for token in tokens] == [0, 0, 3, 5]
    assert tokens[0].logprob is None
    assert tokens[1].logprob == tokens[3].top[0][1] == float(LOGITS.log_softmax(-1)[0])


@settings(max_examples=60)
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(-(2**63), 2**63 - 1),
)
def test_a_token_of_the_vocabulary_is_chosen_whatever_the_settings(
    values: list[float], top_p: float, min_p: float, top_k: int, seed: int
) -> None:
    sampling = Sampling(1, temperature=0.7, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed)
    chosen = choose(Sampler(sampling, (0,)), torch.tensor(values)).id
    assert chosen is not None
    assert 0 <= chosen < len(values)


TINY = [1e-5 / 2, 1e-7, 1e-38, 1e-40, 1.4e-45, 1e-320, 5e-324]


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4, 1e30])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float, spread: float) -> None:
    sampler = Sampler(Sampling(9, temperature=temperature, top_p=0.9, top_k=3, min_p=0.1), (0,))
    assert sampler.row().is_plain
    assert choose(sampler, LOGITS * spread).id == 0


SMALLEST = [5e-324, 1e-320, 1.4e-45, 1e-40, 1e-38, 1e-30, 1e-5, 0.01]


@settings(max_examples=200)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=2, max_size=40),
    temperature=st.sampled_from([1e-5, 1e-4, 1.0, 100.0]),
    top_p=st.sampled_from([0.0, *SMALLEST, 1.0]),
    min_p=st.sampled_from([0.0, *SMALLEST, 1.0]),
    penalty=st.sampled_from([*SMALLEST, 1.0, 100.0]),
    bias=st.sampled_from([-100.0, 0.0, 100.0]),
    counts=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_no_setting_makes_a_probability_that_is_no_number(
    values: list[float],
    temperature: float,
    top_p: float,
    min_p: float,
    penalty: float,
    bias: float,
    counts: float,
) -> None:
    options = {"top_p": top_p, "min_p": min_p, "repetition_penalty": penalty}
    options |= {"presence_penalty": counts, "frequency_penalty": counts}
    made = Sampling(9, temperature=temperature, logit_bias={0: bias, 1: bias}, seed=1, **options)
    sampler = Sampler(made, (0,))
    logits = torch.tensor(values)
    for _ in range(3):
        scores = adjusted(sampler, logits)
        expected = adjust(logits, made, (0,), sampler.generated)
        assert not scores.isnan().any()
        assert scores.max() < torch.inf
        assert torch.allclose(scores, expected, rtol=1e-6, atol=1e-5)
        chosen = choose(sampler, logits).id
        assert chosen is not None
        assert scores[chosen] > -torch.inf


def test_a_banned_token_is_never_drawn() -> None:
    sampler = Sampler(Sampling(999, temperature=100.0, seed=1, suppress_tokens=[0, 2, 4]), (0,))
    by = TokenChooser()
    assert {step([sampler], LOGITS.unsqueeze(0), by)[0].id for _ in range(400)} == {1, 3}


def test_answers_follow_the_exact_distribution_with_penalties_and_bias() -> None:
    """1500 answers of 3 tokens, by their own seeds: chi-square over the 3rd, given the first two."""
    torch.manual_seed(0)
    sampling = Sampling(
        9, temperature=0.8, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={2: 0.7}
    )
    logits = torch.randn(3, 6) * 1.2
    samplers = [Sampler(dataclasses.replace(sampling, seed=seed), (1, 4)) for seed in range(1500)]
    by = TokenChooser()
    for row in logits:
        step(samplers, row.expand(len(samplers), -1).contiguous(), by)
    expected, got = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for sampler in samplers:
        scores = adjust(logits[2], sampling, (1, 4), sampler.generated[:2])
        expected += distribution(scores, sampling)
        got[sampler.generated[2]] += 1
    often = expected >= 5
    assert ((got - expected)[often] ** 2 / expected[often]).sum() < 25, "chi-square, 5 degrees: p < 0.0002"


class Even:
    """A constraint that allows even tokens only."""

    def allowed(self) -> bytes:
        return bytes(token % 2 == 0 for token in range(500))

    def take(self, token: int) -> None:
        assert token % 2 == 0


def settings_of_all_kinds() -> list[dict[str, Any]]:
    return [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 5.0, "top_p": 0.99},  # needs more than the shortlist
        {"temperature": 1.5, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.5, "top_k": 300},
        {"frequency_penalty": 0.5, "presence_penalty": -0.3},
        {"logit_bias": {7: 4.0, 9: -100.0}},
        {"no_repeat_ngram_size": 1, "temperature": 1.0},
        {"min_new_tokens": 4, "stop_ids": frozenset(range(400))},
        {"grammar": Grammar(Constraint("regex", "", ""), Even), "temperature": 1.0},
        {"allowed_token_ids": list(range(40, 90)), "temperature": 1.0},
        {"forced_eos_token_id": [3], "max_new_tokens": 3},
    ]


def test_a_row_is_chosen_alone_as_among_31_others() -> None:
    torch.manual_seed(3)
    kinds = settings_of_all_kinds()
    logits = (torch.randn(6, 32, 1000) * 2).bfloat16()

    def samplers() -> list[Sampler]:
        made = [
            Sampling(
                **{"max_new_tokens": 99, "seed": n, "top_logprobs": n % 3 or None} | kinds[n % len(kinds)]
            )
            for n in range(32)
        ]
        return [Sampler(each, tuple(range(n, n + 5))) for n, each in enumerate(made)]

    by, among = TokenChooser(), samplers()
    together = [step(among, each, by) for each in logits]
    for n, sampler in enumerate(samplers()):
        alone = TokenChooser()
        for tokens, each in zip(together, logits, strict=True):
            assert step([sampler], each[n : n + 1], alone) == [tokens[n]], kinds[n % len(kinds)]


def test_rows_that_come_and_go_keep_their_penalties() -> None:
    """Each row greedy with a frequency penalty: what it counts shows in what it chooses next."""
    torch.manual_seed(4)
    sampling = Sampling(99, frequency_penalty=0.6, repetition_penalty=1.1)
    logits = torch.randn(5, 30)
    alone = [Sampler(sampling, (n,)) for n in range(5)]
    for sampler, row in zip(alone, logits, strict=True):
        for _ in range(12):
            choose(sampler, row)
    among, by = [Sampler(sampling, (n,)) for n in range(5)], TokenChooser()
    for turn in range(40):
        present = [n for n in range(5) if len(among[n].generated) < 12 and (turn // 3 + n) % 3]
        if present:
            step([among[n] for n in present], logits[present], by)
    assert [each.generated for each in among] == [each.generated for each in alone]
    assert len(set(alone[0].generated)) > 3


def test_penalties_outgrow_their_room() -> None:
    """Every token once: each choice is the likeliest that did not come before."""
    vocabulary = ROOM + 300
    sampler, by = Sampler(Sampling(9999, presence_penalty=1e6), (1,)), TokenChooser()
    logits = torch.arange(vocabulary, dtype=torch.float32).unsqueeze(0)
    chosen = [step([sampler], logits, by)[0].id for _ in range(vocabulary)]
    assert chosen == list(reversed(range(vocabulary)))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 0.3},
        {"no_repeat_ngram_size": 2, "temperature": 1.0, "seed": 3},
        {"temperature": 0.9, "top_p": 0.8, "seed": 5, "repetition_penalty": 1.2, "min_new_tokens": 3,
         "stop_ids": frozenset({1, 2})},
    ],
)  # fmt: skip
def test_tokens_after_a_draft_are_chosen_as_one_after_another(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    logits = torch.randn(6, 12)
    one = Sampler(Sampling(99, **options), (1, 2, 3))
    expected = [choose(one, row).id for row in logits]
    draft = tuple(token for token in expected if token is not None)[:5]
    drafted, by = Sampler(Sampling(99, **options), (1, 2, 3)), TokenChooser()
    for _ in range(2):  # again: nothing of a draft may stay behind
        rows = [drafted.row(draft[:count]) for count in range(6)]
        assert [choice.token for choice in by.choose(logits, rows)] == expected


def test_a_row_that_is_not_finite_is_told_and_the_others_are_chosen() -> None:
    logits = LOGITS.repeat(5, 1)
    logits[1, 2], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_logprobs": 2}):
        samplers = [Sampler(Sampling(9, seed=1, repetition_penalty=1.2, **options), (0,)) for _ in range(5)]
        choices = TokenChooser().choose(logits, [sampler.row() for sampler in samplers])
        assert [choice.finite for choice in choices] == [True, False, False, False, True]
        assert [choice.token is None for choice in choices] == [False, True, True, True, False]
        assert choices[0].token == choices[4].token


def test_ids_that_the_model_does_not_have_change_no_row() -> None:
    """Flattened, they would be ids of the next row."""
    odd = Sampling(
        9, logit_bias={5: 100.0, -1: 100.0}, suppress_tokens=[5, 6, -2], repetition_penalty=3.0,
        allowed_token_ids=[0, 1, 7],
    )  # fmt: skip
    tokens = step([Sampler(odd, (0, 9)), Sampler(Sampling(9), (0,))], LOGITS.repeat(2, 1))
    assert [token.id for token in tokens] == [1, 0]


class Copies(TorchDispatchMode):
    """Counts operations, and those that make the host wait for a device: the logits are on `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [
            each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)
        ]
        if any(each.is_meta for each in tensors):
            self.operations += 1
            to_host = str((kwargs or {}).get("device")) == "cpu"
            self.waits += to_host or func.overloadpacket in WAITING
        return func(*args, **(kwargs or {}))


WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
    torch.ops.aten.equal,
    torch.ops.aten.repeat_interleave,
}


@pytest.mark.parametrize("kind", range(len(settings_of_all_kinds())))
def test_a_step_waits_for_the_device_once_in_a_number_of_operations_that_rows_do_not_change(
    kind: int,
) -> None:
    made = Sampling(**{"max_new_tokens": 99, "seed": 1} | settings_of_all_kinds()[kind])
    counted = []
    for count in (1, 8, 32):
        samplers, by = [Sampler(made, (1, 2)) for _ in range(count)], TokenChooser()
        logits = torch.empty(count, 32_000, device="meta", dtype=torch.bfloat16)
        for warm in range(3):
            rows = [sampler.row() for sampler in samplers]
            with Copies() as mode:
                by.enqueue(logits, rows)
            for sampler, row in zip(samplers, rows, strict=True):
                sampler.take(row, Choice(2 * warm + 40))
        assert mode.waits == 0
        counted.append(mode.operations)
    assert len(set(counted)) == 1, counted
    assert counted[0] < 75


def test_a_step_is_read_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: read.append(self.numel()) or original(self))
    samplers = [Sampler(Sampling(9, temperature=0.7, top_p=0.9, top_logprobs=2), (0,)) for _ in range(8)]
    step(samplers, LOGITS.repeat(8, 1))
    assert read == [8 * (2 + 2 * 2)]


def test_a_row_whose_shortlist_was_too_short_is_ranked_whole_from_then_on() -> None:
    torch.manual_seed(6)
    logits = torch.randn(1, 2000)
    sampler, by = Sampler(Sampling(99, temperature=2.0, top_p=0.99, seed=1), (0,)), TokenChooser()
    passes = []
    original = by.enqueue
    by.enqueue = lambda *each: passes.append(1) or original(*each)  # type: ignore[method-assign, func-returns-value]
    for _ in range(20):
        step([sampler], logits, by)
    assert len(passes) == 21
