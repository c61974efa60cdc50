"""Programs against tests: right, wrong, endless, greedy, crashing, in every form of tests."""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.code import CodeVerifier
from megatron_vcppo.rewards.verifier import Verdict

SUM = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
ADD = "a, b = map(int, input().split())\nprint(a + b)  "


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    verifier = CodeVerifier(10.0, 1 << 30)
    yield verifier
    verifier.close()


def judge(verifier: CodeVerifier, code: str, answer: Any) -> Verdict:
    prompt = Prompt("p:1", (1,), "write it", json.dumps(answer), "code")
    return verifier(prompt, f"<think>```python\nprint('not this one')\n```</think>Here:\n```python\n{code}\n```\n")


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (ADD, "correct"),
        ("print(3)", "wrong: test 2: wrong output"),
        ("raise SystemExit(3)", "wrong: test 1: exit code 3"),
        ("raise SystemExit('no')", "wrong: test 1: exit code 1"),
        (f"{ADD}\nimport sys\nsys.exit()", "correct"),
        (f"{ADD}\nimport sys\nsys.exit(1)", "wrong: test 1: exit code 1"),
        ("import os\nos.abort()", "wrong: test 1: exit code -6"),
        ("x = bytearray(1 << 31)", "wrong: test 1: exit code 1"),
        ("while True: print('x' * 1000000)", "wrong: test 1: exit code 1"),
        ("this is no program", "wrong: test 1: exit code 1"),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "correct"),
        ("print(sum(map(int, open(0).read().split())))", "correct"),
        ("print(sum(map(int, open('/dev/stdin').read().split())))", "correct"),
        ("import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))", "correct"),
        ("import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))", "correct"),
        (f"def main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\nif __name__ == '__main__':\n    main()",
         "correct"),
        (f"import threading\ndef main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\n"
         "threading.stack_size(1 << 26)\nthreading.Thread(target=main).start()", "correct"),
        ("import atexit\natexit.register(print, 3)", "wrong: test 2: wrong output"),
        ("from __future__ import annotations\nimport sys\nsys.setrecursionlimit(10**6)\n"
         "def deep(n): return deep(n - 1) + 1 if n else 0\nassert deep(30000) == 30000\n" + ADD, "correct"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n" + ADD, "correct"),
        ("x: List[int] = deque(Counter('a'))\n" + ADD, "correct"),
        ("assert pow(2, 10, 1000) == 24 and bisect.bisect_left([1], 1) == bisect_left([1], 1)\n" + ADD, "correct"),
        ("open('notes', 'w').write('7')\n" + ADD, "correct"),
        ("import os\nassert not os.path.exists('notes') and sorted(os.environ)[0] != 'WANDB_API_KEY'\n" + ADD,
         "correct"),
        ("import asyncio\nasync def main():\n    a, b = input().split()\n    print(int(a) + int(b))\n"
         "asyncio.run(main())",
         "correct"),
        ("print(*map(sum, [[int(x) for x in input().split()]]), end='\\r\\n')", "correct"),
    ],
)  # fmt: skip
def test_programs_that_read_and_print(verifier: CodeVerifier, code: str, verdict: str) -> None:
    assert judge(verifier, code, SUM) == Verdict(1.0 if verdict == "correct" else -1.0, verdict)


CLASSES = """
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __eq__(self, other): return self.items == other.items
    def __add__(self, other): return Stack(self.items + other.items)
    def __str__(self): return f"Stack{self.items}"
class Empty(LookupError): pass
def apply(g, *args): return g(*args)
def fail(): raise Empty("empty")
def sort(a): a.sort()
def count(n): yield from range(n)
def adder(n): return lambda x: x + n
LIMIT = 10
"""


@pytest.mark.parametrize(
    ("code", "asserts", "verdict"),
    [
        ("def f(x):\n    return x * x", ["assert f(2) == 4", "assert f(3) == 9"], "correct"),
        ("def f(x):\n    return x + x", ["assert f(2) == 4", "assert f(3) == 9"], "wrong: test 2: assertion failed"),
        ("def f(x):\n    return x + x", ["assert f(3) == 9, 'no square'"],
         "wrong: test 1: assertion failed: no square"),
        ("def g(x):\n    return x", ["assert f(3) == 9"], "wrong: test 1: NameError: name 'f' is not defined"),
        ("def f(x):\n    return x / 0", ["assert f(3)"], "wrong: test 1: ZeroDivisionError: division by zero"),
        ("def f(x):\n  return", ["assert f(3) is None", "assert not f(1)"], "correct"),
        ("def f(n):\n    return set(range(n)), {n: (n,)}, 2.0**n, 'é'",
         ["assert f(2) == ({0, 1}, {2: (2,)}, 4.0, 'é') and isinstance(f(2), tuple)"], "correct"),
        ("def f(n):\n    return 10**n", ["assert f(5000) == 10**5000"], "correct"),
        ("def f(n):\n    return math.sqrt(n)", ["assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)"], "correct"),
        ("def f(n):\n    return Counter('aab')", ["assert f(2) == {'a': 2, 'b': 1}"], "correct"),
        ("def max(a):\n    return sorted(a)[-1]", ["assert max([1, 3, 2]) == 3"], "correct"),
        ("def f(x):\n    return x * x", ["def check(candidate):\n    assert candidate(3) == 9\ncheck(f)"], "correct"),
        ("def f(x):\n    return 0", ["def check(candidate):\n    assert candidate(3) == 9\ncheck(f)"],
         "wrong: test 1: assertion failed"),
        ("class Solution:\n    def f(self, x):\n        return x", ["assert Solution().f(3) == 3"], "correct"),
        (CLASSES, ["s = Stack()\ns.push(3)\ns.push(4)", "assert len(s) == 2 and s.pop() == 4 and s.items == [3]"],
         "correct"),
        (CLASSES, ["assert Stack([1]) == Stack([1]) and Stack([1]) != Stack([2])", "assert Stack([1]) != [1]"],
         "correct"),
        (CLASSES, ["assert (Stack([1]) + Stack([2])).items == [1, 2]", "assert str(Stack()) == 'Stack[]'"], "correct"),
        (CLASSES, ["assert list(Stack([1, 2])) == [1, 2] and 2 in Stack([1, 2]) and Stack([5])[0] == 5"], "correct"),
        (CLASSES, ["assert apply(lambda x: x + 1, 3) == 4", "assert adder(2)(3) == 5 and LIMIT == 10"], "correct"),
        (CLASSES, ["assert apply(adder(2), 3) == 5"], "correct"),
        (CLASSES, ["try:\n    fail()\n    assert False\nexcept Empty as error:\n    assert str(error) == 'empty'"],
         "correct"),
        (CLASSES, ["try:\n    fail()\n    assert False\nexcept LookupError:\n    pass"], "correct"),
        (CLASSES, ["a = [3, 1]\nsort(a)\nassert a == [1, 3]", "assert list(count(3)) == [0, 1, 2]"], "correct"),
        (CLASSES, ["assert sum(count(4)) == 6 and max(count(4)) == 3 and [*zip(count(2), 'ab')][1] == (1, 'b')"],
         "correct"),
    ],
)  # fmt: skip
def test_asserts(verifier: CodeVerifier, code: str, asserts: list[str], verdict: str) -> None:
    assert judge(verifier, code, {"asserts": asserts}).verdict == verdict
    assert judge(verifier, code, ["\n".join(asserts)]).verdict.partition(":")[0] == verdict.partition(":")[0]


def test_setup_is_the_programs(verifier: CodeVerifier) -> None:
    setup = "class Node:\n    def __init__(self, value): self.value = value\nroot = Node(5)"
    answer = {"asserts": ["assert value_of(root) == 5"], "setup": setup}
    assert judge(verifier, "def value_of(node): return node.value", answer).verdict == "correct"


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("def f(a, b):\n    return a + b", "correct"),
        ("class Solution:\n    def f(self, a: List[int], b: List[int]) -> List[int]:\n        return a + b", "correct"),
        ("class Solution:\n    def f(self, a, b):\n        return tuple(a + b)", "correct"),
        ("def f(a, b):\n    print('noise')\n    return a + b", "correct"),
        ("def f(a, b):\n    return a", "wrong: test 2: wrong result"),
        ("def f(a, b):\n    return object()", "wrong: test 1: exit code 1"),
        ("def f(a):\n    return a", "wrong: test 1: exit code 1"),
        ("def g(a, b):\n    return a + b", "wrong: test 1: exit code 1"),
        ("import os\ndef f(a, b):\n    os._exit(0) if b else None\n    return a + b", "wrong: test 2: no result"),
        ("import os\nos.write(4, b'[1]\\n[1, 2]\\n')\nos._exit(0)", "correct"),  # who knows the results has solved it
        ("import os\nos.write(4, b'[[[\\n')\nos._exit(0)", "wrong: test 1: wrong result"),
        ("import os\nos.write(4, b'[' * 100000 + b'\\n')\nos._exit(0)", "wrong: test 1: wrong result"),
    ],
)  # fmt: skip
def test_calls(verifier: CodeVerifier, code: str, verdict: str) -> None:
    answer = {"fn_name": "f", "inputs": [[[1], []], [[1], [2]]], "outputs": [[1], [1, 2]]}
    assert judge(verifier, code, answer).verdict == verdict
    text = {"fn_name": "f", "inputs": ["[1]\n[]", "[1]\n[2]"], "outputs": ["[1]", "[1, 2]"]}
    assert judge(verifier, code, text).verdict == verdict


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="no numpy here")
def test_numpy_where_it_is_installed(verifier: CodeVerifier) -> None:
    code = "import numpy as np\ndef f(n): return np.arange(n) * 2\ndef g(n): return np.float64(n)"
    asserts = ["assert f(3).tolist() == [0, 2, 4]", "assert np.allclose(f(2), [0, 2])", "assert g(3) == 3"]
    assert judge(verifier, code, {"asserts": asserts}).verdict == "correct"
    assert judge(verifier, code, {"fn_name": "f", "inputs": [[3]], "outputs": [[0, 2, 4]]}).verdict == "correct"


def test_programs_and_tests_of_any_size(verifier: CodeVerifier) -> None:
    """A command line holds 128 KiB; nothing of a problem is on one."""
    padding = "#" * 300_000
    asserts = [f"assert f(2) == 4  {padding}", f"assert len({'x' * 300_000!r}) == f(300_000) // 300_000"]
    assert judge(verifier, f"def f(x):\n    return x * x  {padding}", asserts).verdict == "correct"
    many = {"inputs": ["1 " * 200_000], "outputs": ["2 " * 200_000]}
    assert judge(verifier, "print(*(int(x) + 1 for x in input().split()))", many).verdict == "correct"


def test_programs_whose_threads_use_up_the_processor_time_are_out_of_time() -> None:
    """Two processors spend the limit of both before the deadline: the kernel kills the program, and nobody else did."""
    program = """
import hashlib, threading, time
data = bytes(1 << 22)
def work():
    while True:
        hashlib.sha256(data).digest()
for _ in range(2):
    threading.Thread(target=work).start()
while True:
    time.sleep(1)
"""
    verifier = CodeVerifier(2.0)
    try:
        assert "time limit" in judge(verifier, program, SUM).verdict
    finally:
        verifier.close()


def test_endless_programs_end() -> None:
    verifier = CodeVerifier(1.0)
    try:
        for answer in (SUM, {"asserts": ["assert f(1)"]}, {"fn_name": "f", "inputs": [[1]], "outputs": [1]}):
            assert "time limit" in judge(verifier, "while True: pass", answer).verdict
        for place in ("raise", "pass"):
            program = f"def f(x):\n    while True: pass\nif not 1: {place}"
            assert "time limit" in judge(verifier, program, {"asserts": ["assert f(1)"]}).verdict
    finally:
        verifier.close()


def test_no_program_and_no_tests(verifier: CodeVerifier) -> None:
    prompt = Prompt("p:1", (1,), "write it", json.dumps(SUM), "code")
    assert verifier(prompt, "no code").verdict == "no answer"
    assert verifier(prompt, "```\nprint(1)").verdict == "no answer"
    for bad in ("{}", "[]", '{"inputs": ["1"], "outputs": []}', "nonsense"):
        with pytest.raises(ValueError):
            verifier(Prompt("p:1", (1,), "", bad, "code"), f"```\n{ADD}\n```")
