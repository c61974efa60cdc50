"""Which part of a response is its program."""

import pytest

from megatron_vcppo.rewards.code import find_program

ONE = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (ONE, "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```Python 3\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```python3 title=\"a.py\"\nprint(1)\n```", "print(1)\n"),
        ("```{.python}\nprint(1)\n```", "print(1)\n"),
        ("``` python\nprint(1)\n```  ", "print(1)\n"),
        ("~~~python\nprint(1)\n~~~", "print(1)\n"),
        ("```python\r\nif x:\r\n    print(1)\r\n```\r\n", "if x:\n    print(1)\n"),
        ("1. First\n\n   ```python\n   if x:\n       print(1)\n   ```", "if x:\n    print(1)\n"),
        (f"```python\nprint(0)\n```\nBetter:\n{ONE}\n", "print(1)\n"),
        (f"{ONE}\nOutput:\n```\n1\n```", "print(1)\n"),
        (f"{ONE}\n```bash\npython a.py\n```\n```text\n1\n```", "print(1)\n"),
        ("```cpp\nint main() {}\n```", None),
        ("````python\ntext = '''\n```\nx\n```\n'''\n````", "text = '''\n```\nx\n```\n'''\n"),
        ("```python\nprint(1)```", "print(1)\n"),
        ("```python\nprint(1)", None),
        (f"{ONE}\n```python\nprint(2)", "print(1)\n"),
        ("`print(1)`", None),
        ("", None),
    ],
)  # fmt: skip
def test_programs_are_found(text: str, program: str | None) -> None:
    assert find_program(text) == program
