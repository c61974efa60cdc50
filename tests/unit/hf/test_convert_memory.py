"""Conversion streams: its memory does not depend on the model's size."""

import argparse
from pathlib import Path

import pytest

from megatron_vcppo.hf.convert.copying import BUCKET_BYTES, NUM_THREADS
from tools.benchmarks import convert


@pytest.mark.slow  # writes a model of 2 GB three times
@pytest.mark.timeout(900)
def test_a_model_of_two_gigabytes_needs_no_more_than_its_largest_tensor(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    cases = {
        case["case"]: case
        for case in convert.run(parser.parse_args(["--gb", "2.1", "--repeats", "1", "--scratch", str(tmp_path)]))
    }
    assert not list(tmp_path.iterdir())
    buckets_mb = 2 * NUM_THREADS * BUCKET_BYTES / 1e6
    for direction in ("import", "export"):
        case = cases[direction]
        assert case["weights_gb"] >= 2.0
        assert case["peak_memory_mb"] < case["largest_tensor_mb"] + buckets_mb < 0.25 * 1000 * case["weights_gb"], case
