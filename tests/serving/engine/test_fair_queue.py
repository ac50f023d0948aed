"""Clients take turns; each client's own requests stay in order."""

from runtime.serving.engine.fair_queue import FairQueue


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for client, item in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")):
        queue.append(client, item)
    assert len(queue) == 6
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert queue.first() is None


def test_the_first_stays_first_until_it_is_taken() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.append("a", "a1")
    queue.append("a", "a2")
    assert queue.first() == "a1"
    queue.append("b", "b1")
    assert queue.first() == "a1"
    assert queue.pop() == "a1"
    assert queue.first() == "b1"


def test_what_is_removed_leaves_its_place() -> None:
    queue: FairQueue[str] = FairQueue()
    for client, item in (("a", "a1"), ("b", "b1"), ("b", "b2")):
        queue.append(client, item)
    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert not queue.remove("b", "b3")
    assert list(queue) == ["b1", "b2"]
    assert (len(queue), queue.pop(), queue.pop()) == (2, "b1", "b2")
