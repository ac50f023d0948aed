"""Which tokens of a step have products of their own, and which are multiplied each with its own adapter."""

import pytest
import torch

from runtime.serving.engine.adapter_groups import Span, group

CPU = torch.device("cpu")


def found(adapters: list[int], *, per_token: bool = False) -> tuple[list[Span], list[int] | None]:
    groups = group(adapters, device=CPU, per_token=per_token)
    assert groups is not None
    return list(groups.spans), None if groups.scattered is None else groups.scattered.tolist()


def test_a_step_without_adapters_has_no_groups() -> None:
    assert group([0, 0, 0], device=CPU) is None


def test_one_or_two_adapters_that_lie_together_are_read_where_they_are() -> None:
    assert found([0, 1, 1, 0, 2]) == ([Span(1, 1, 3), Span(2, 4, 5)], None)


def test_scattered_adapters_are_gathered_with_zeros_for_tokens_of_the_base_model() -> None:
    assert found([0, 1, 2, 0, 1, 0]) == ([], [0, 1, 2, 0, 1])


def test_a_chunk_behind_scattered_tokens_has_products_of_its_own() -> None:
    assert found([1, 2, 1, *[3] * 100]) == ([Span(3, 3, 103)], [1, 2, 1])


def test_many_short_prompts_behind_decoding_tokens_are_gathered_too() -> None:
    adapters = [number for number in range(1, 21) for _ in range(12)]
    assert found(adapters) == ([], adapters)


def test_scattered_tokens_behind_a_long_prompt_do_not_gather_it() -> None:
    adapters = [*[1] * 400, 2, 3, 2]
    spans, scattered = found(adapters)
    assert (len(spans), scattered) == (4, None)


@pytest.mark.parametrize("adapters", [[1], [1, 2, 1], [*[1] * 16, 2, 3, 2]])
def test_kernels_take_short_spans_wherever_they_lie_and_no_long_ones(adapters: list[int]) -> None:
    spans, scattered = found(adapters, per_token=True)
    assert spans == [Span(1, 0, 16)] * (len(adapters) > 16)
    assert scattered == [*[0] * 16 * len(spans), *adapters[16 * len(spans) :]]
