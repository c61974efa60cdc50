"""Search: reach a digit from another with few moves, by trying, going back and trying again.

Prompt ``3 reach 8 with +4 -9 *2 within 2 ?``; response ``<think> *2 6 +4 0 back 6 -9 7 back 6 back 3 +4 7 …``.
A step is ``move result``, ``back digit`` returns to an earlier digit, a check is ``chk before move result``.
The answer is a list of moves; any list that gets there within the limit is right.
"""

from dataclasses import dataclass, field
from random import Random

from megatron_vcppo.tasks.task import Problem, Style, write_response
from megatron_vcppo.tasks.word_tokenizer import ASK, CHECK, SEARCH_OPS, SUM_OPS

_MOVES = (*(move for move in SUM_OPS if move not in ("+0", "-0")), *SEARCH_OPS)
_NUM_MOVES = 3


class SearchTask:
    """Shortest solutions have exactly ``num_steps`` moves, which is also the limit in the prompt."""

    name = "search"
    default_steps = (2, 4)
    max_steps = 5

    def problem(self, rng: Random, num_steps: int) -> Problem:
        """Moves and start are uniform among those for which some digit is ``num_steps`` moves away."""
        while True:
            start = rng.randrange(10)
            moves = rng.sample(_MOVES, _NUM_MOVES)
            paths = _shortest_paths(start, moves)
            far = [goal for goal, path in paths.items() if len(path) == num_steps]
            if far:
                goal = rng.choice(far)
                prompt = f"{start} reach {goal} with {' '.join(moves)} within {num_steps} {ASK}"
                return Problem(prompt, " ".join(paths[goal]))

    def demonstration(self, rng: Random, prompt: str, style: Style) -> str:
        """Depth-first search in random order; a mistaken result is believed unless a check corrects it."""
        start, goal, moves, limit = _parse(prompt)
        quits, check_rate = style.draw(rng)
        # A search takes about as many tries as there are nodes down to the limit that are not repeated.
        max_tries = rng.randrange(2 * limit) if quits else 10 * _NUM_MOVES
        writer = _Writer(rng, style, goal, moves, check_rate, max_tries)
        writer.explore(start, limit)
        return write_response(writer.steps, " ".join(writer.path or writer.last_path or [rng.choice(moves)]))

    def is_correct(self, prompt: str, answer: str, given: str) -> bool:
        """The moves are among those allowed, not too many, and lead to the goal."""
        value, goal, moves, limit = _parse(prompt)
        path = given.split()
        if not 1 <= len(path) <= limit or any(move not in moves for move in path):
            return False
        for move in path:
            value = apply_move(value, move)
        return value == goal


def apply_move(value: int, move: str) -> int:
    """+k, -k or *k, modulo 10."""
    return value * int(move[1:]) % 10 if move[0] == "*" else (value + int(move)) % 10


@dataclass
class _Writer:
    rng: Random
    style: Style
    goal: int
    moves: list[str]
    check_rate: float
    max_tries: int
    steps: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    """Moves from the start to where the search stands; the solution once ``explore`` returns True."""
    last_path: list[str] = field(default_factory=list)
    num_tries: int = 0
    seen: dict[int, int] = field(default_factory=dict)
    """Digit → most moves that were left when it was reached."""

    def explore(self, value: int, num_left: int) -> bool:
        """Search on from a digit; True ends the search, with the goal reached (or so it is believed) or given up."""
        if value == self.goal:
            return True
        if num_left <= self.seen.get(value, 0):
            return False
        self.seen[value] = num_left
        for move in self.rng.sample(self.moves, len(self.moves)):
            if self.num_tries == self.max_tries:
                return True
            self.num_tries += 1
            result = self._noisy(value, move, self.style.mistake_rate)
            self.steps += [move, str(result)]
            if self.rng.random() < self.check_rate:
                self.steps += [CHECK, str(value), move]
                result = self._noisy(value, move, self.style.check_mistake_rate)
                self.steps.append(str(result))
            self.path.append(move)
            if self.explore(result, num_left - 1):
                return True
            self.last_path = [*self.path]
            self.path.pop()
            self.steps += ["back", str(value)]
        return False

    def _noisy(self, value: int, move: str, mistake_rate: float) -> int:
        result = apply_move(value, move)
        return result if self.rng.random() >= mistake_rate else (result + self.rng.randrange(1, 10)) % 10


def _shortest_paths(start: int, moves: list[str]) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = {start: []}
    queue = [start]
    for value in queue:
        for move in moves:
            result = apply_move(value, move)
            if result not in paths:
                paths[result] = [*paths[value], move]
                queue.append(result)
    return paths


def _parse(prompt: str) -> tuple[int, int, list[str], int]:
    """start, goal, moves, limit"""
    words = prompt.split()
    return int(words[0]), int(words[2]), words[4:-3], int(words[-2])


SEARCH = SearchTask()
