"""What a user sees of a process: one format, from ``say`` and from Python's logging."""

import subprocess
import sys


def output_of(code: str) -> list[str]:
    """Lines on standard output of a new interpreter, the time cut off; stderr must stay empty."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert all(line[2] == line[5] == ":" and line[8] == " " for line in lines)
    return [line[9:] for line in lines]


def test_every_line_names_role_and_rank() -> None:
    code = (
        "import logging\n"
        "from megatron_vcppo.run import log\n"
        "log.configure('trainer', 3)\n"
        "log.configure('trainer', 3)\n"
        "log.say('note: said')\n"
        "logging.getLogger('megatron_vcppo.weight_sync').info('pushed %d', 7)\n"
        "logging.getLogger('megatron_vcppo.weight_sync').warning('slow')\n"
        "logging.getLogger('library').warning('old')\n"
        "logging.getLogger('library').info('chatter')\n"
    )
    assert output_of(code) == [
        "trainer 3: note: said",
        "trainer 3: pushed 7",
        "trainer 3: warning: slow",
        "trainer 3: warning: old",
    ]


def test_a_role_of_one_process_has_no_rank() -> None:
    assert output_of("from megatron_vcppo.run import log; log.configure('controller'); log.say('done')") == [
        "controller: done"
    ]


def test_a_process_without_a_role_says_the_text_alone() -> None:
    code = "from megatron_vcppo.run import log; log.say('text')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "text\n"
