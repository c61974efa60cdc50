"""The Triton kernels, in Triton's interpreter: the same source that a GPU compiles, on a CPU."""

import json
import os
import subprocess
import sys


def test_kernels_agree_with_the_oracle_and_with_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.interpreted_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors["gae"] <= 1e-12
    assert errors["float32"] <= 1e-5
    assert errors["bfloat16"] <= 0.02  # gradients are rounded to bfloat16 on both sides
