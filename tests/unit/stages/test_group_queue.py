"""Which finished groups an iteration trains on."""

import random

import pytest

from megatron_vcppo.stages.group_queue import GroupState, choose_groups

WAITING = GroupState(None, False)


def states(text: str) -> list[GroupState]:
    """ "0f 0r 1f -": version begun under, finished or running; - waits."""
    return [WAITING if word == "-" else GroupState(int(word[:-1]), word[-1] == "f") for word in text.split()]


@pytest.mark.parametrize("state", [WAITING, GroupState(0, False), GroupState(0, True), GroupState(17, True)])
def test_a_state_travels_as_a_number(state: GroupState) -> None:
    assert GroupState.unpacked(state.packed()) == state


@pytest.mark.parametrize(
    ("text", "iteration", "staleness", "chosen"),
    [
        ("0f 0r 0f -", 1, 1, [0, 2]),
        ("0f 0r 0r -", 1, 1, None),  # not enough
        ("1f 0f 1f 1f", 2, 1, [0, 1]),  # the oldest version first, then the order of the stream
        ("0r 1f 1f 1f", 2, 1, None),  # due now
        ("0r 1f 1f 1f", 2, 2, [1, 2]),  # due at the next iteration, which has room for it
        ("0r 0r 0r 1f 1f 1f", 2, 2, None),  # there would be three, and there is room for two
        ("0f 0r 0r 1f 1f 1f", 2, 2, [0, 3]),
        ("0f 0f 0f 0r", 9, 1, [0, 1]),  # more are due than there is room for, after a change of settings
    ],
)
def test_the_oldest_finished_groups_are_taken_and_those_that_are_due_waited_for(
    text: str, iteration: int, staleness: int, chosen: list[int] | None
) -> None:
    assert choose_groups(states(text), 2, iteration, staleness) == chosen


def test_partial_rollouts_wait_for_nobody() -> None:
    assert choose_groups(states("0r 1f 1f 1f"), 2, 2, 1, wait_for_due=False) == [1, 2]
    assert choose_groups(states("0r 1f 1r 1r"), 2, 2, 1, wait_for_due=False) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_older_than_staleness_allows(seed: int) -> None:
    """Engines that finish whatever they like, and begin as much as they are given."""
    chance = random.Random(seed)
    count, staleness, iterations = chance.randint(1, 4), chance.randint(0, 3), 12
    groups: list[list] = []  # version begun under, finished
    num_taken = num_trained = 0
    for iteration in range(1, iterations + 1):
        while len(groups) < count * (min(staleness, iterations - iteration) + 1):
            groups.append([None, False])
            num_taken += 1
        while True:
            chosen = choose_groups([GroupState(*group) for group in groups], count, iteration, staleness)
            if chosen is not None:
                break
            waiting = [group for group in groups if group[0] is None]
            running = [group for group in groups if group[0] is not None and not group[1]]
            for group in waiting[: chance.randint(0, 3)]:
                group[0] = iteration - 1
            if running:
                chance.choice(running)[1] = True
        assert len(chosen) == count and all(groups[index][1] for index in chosen)
        assert all(groups[index][0] + 1 + staleness >= iteration for index in chosen)
        groups = [group for index, group in enumerate(groups) if index not in chosen]
        num_trained += count
    assert not groups and num_taken == num_trained == count * iterations
