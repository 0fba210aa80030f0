"""The waiting queue against a list that is sorted again each time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bros_router.scheduling.queues import WaitingQueue
from simulated_ranks import make_sequence

#: Pushes with a new key, or removals; which sequence; a key.
ACTIONS = st.lists(st.tuples(st.sampled_from(("push", "remove", "pop")), st.integers(0, 7), st.integers(0, 5)))


@given(actions=ACTIONS)
def test_the_first_is_the_least_even_of_those_that_came_back_with_another_key(actions):
    sequences = [make_sequence(index, 4, 4) for index in range(8)]
    keys: dict[int, tuple[float, float]] = {}
    queue = WaitingQueue(lambda sequence: keys[sequence.sequence_id])
    for action, index, key in actions:
        if action == "push" and index not in keys:
            keys[index] = (key, index)
            queue.push(sequences[index])
        elif action == "remove" and index in keys:
            queue.remove(sequences[index])
            del keys[index]
        elif action == "pop" and keys:
            del keys[queue.pop().sequence_id]
        first = queue.peek()
        assert (first and first.sequence_id) == (min(keys, key=keys.get) if keys else None)
        assert sorted(sequence.sequence_id for sequence in queue) == sorted(keys)
        assert len(queue) == len(keys)


def test_what_was_removed_does_not_pile_up():
    queue = WaitingQueue(lambda sequence: (sequence.arrival_s,))
    last = make_sequence(0, 4, 4)
    queue.push(last)
    for index in range(1, 10_000):
        sequence = make_sequence(index, 4, 4)
        queue.push(sequence)
        queue.remove(sequence)
    assert queue.peek() is last
    assert len(queue._heap) < 200
