"""The GAE benchmark measures what it says: equal results, every case reported."""

import argparse
from typing import Any

import pytest
import torch

from megatron_vcppo.algo.gae import decoupled_gae
from tools.benchmarks import gae as benchmark


def test_a_small_case_is_reported_whole():
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    arguments = ["--shapes", "4x300", "--masks", *benchmark.MASKS, "--repeats", "3", "--threads", "1", "--loop"]
    cases: list[dict[str, Any]] = list(benchmark.run(parser.parse_args(arguments)))
    assert [case["mask"] for case in cases] == list(benchmark.MASKS)
    for case in cases:
        assert case["largest_error"] < 1e-4
        assert case["token_loop"]["best_ms"] > 0 and case["ours"]["best_ms"] > 0 and case["copy"]["best_ms"] > 0


@pytest.mark.parametrize("kind", benchmark.MASKS)
def test_the_token_loop_computes_the_same(kind):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 400, generator=generator).unbind()
    mask = benchmark.make_mask(3, 400, kind, generator)
    assert bool(mask.all()) == (kind == "full")
    loop = benchmark.token_loop(rewards, values, mask, 1.0, 0.95, 1.0)
    ours = decoupled_gae(rewards=rewards, values=values, mask=mask, gamma=1.0, lam_actor=0.95, lam_critic=1.0)
    torch.testing.assert_close(loop, ours, rtol=1e-4, atol=1e-4)
