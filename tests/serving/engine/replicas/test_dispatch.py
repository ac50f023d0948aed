"""Which replica gets a request: warm caches first, unless that would leave another one idle."""

from runtime.serving.engine.protocol import Request
from runtime.serving.engine.replicas.dispatch import (
    BLOCK_TOKENS,
    LEAST_BLOCKS,
    MOST_AHEAD,
    Dispatcher,
    ReplicaLoad,
)
from tests.serving.engine.calls import make_request
from tests.serving.engine.models import some_prompts

ONE, OTHER = some_prompts(3 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)


def dispatcher(replicas: int = 3, *, rows: int = 8) -> Dispatcher:
    return Dispatcher([ReplicaLoad(rows) for _ in range(replicas)], cache_tokens=0)


def answered(made: Dispatcher, request: Request) -> int:
    number = made.choose(request)
    made.ended(number, request)
    return number


def test_requests_without_a_common_beginning_go_round() -> None:
    made = dispatcher()
    assert [made.choose(make_request((number,))) for number in range(6)] == [0, 1, 2, 0, 1, 2]


def test_among_equally_many_requests_the_fewest_tokens_decide() -> None:
    made = dispatcher(2)
    assert made.choose(make_request(ONE)) == 0
    assert made.choose(make_request((1,))) == 1
    assert made.choose(make_request((2,))) == 1
    assert made.choose(make_request((3,))) == 0


def test_the_longest_beginning_decides() -> None:
    made = dispatcher()
    assert answered(made, make_request(ONE[:BLOCK_TOKENS])) == 0
    longer = make_request(ONE)
    made.choose(make_request((1,) * 9))  # the idlest is another one from here on
    assert answered(made, longer) == 0
    assert answered(made, make_request(OTHER)) == 2
    assert answered(made, make_request((*ONE, 5, 6))) == 0
    assert answered(made, make_request((*OTHER, 5, 6))) == 2


def test_an_adapter_has_beginnings_of_its_own() -> None:
    made = dispatcher(2)
    assert answered(made, make_request(ONE)) == 0
    assert answered(made, make_request(ONE, adapter="a")) == 1
    assert answered(made, make_request(ONE, adapter="a")) == 1


def test_a_popular_beginning_spreads_once_others_idle() -> None:
    made = dispatcher(2)
    chosen = [made.choose(make_request(ONE)) for _ in range(12)]
    assert chosen[: MOST_AHEAD + 1] == [0] * (MOST_AHEAD + 1)
    assert 1 in chosen
    assert abs(chosen.count(0) - chosen.count(1)) <= MOST_AHEAD


def test_a_full_replica_gets_nothing() -> None:
    made = dispatcher(2, rows=1)
    assert made.choose(make_request(ONE)) == 0
    assert made.choose(make_request(ONE)) == 1


def test_what_is_remembered_is_bounded() -> None:
    made = dispatcher()
    for start in range(3):
        made.choose(make_request((start,) * (BLOCK_TOKENS * LEAST_BLOCKS)))
    assert len(made._seen) == LEAST_BLOCKS
