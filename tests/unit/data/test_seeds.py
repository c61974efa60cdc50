"""Seeds of responses."""

from megatron_vcppo.data.seeds import sample_seed


def test_seeds_are_the_same_in_every_process_and_differ_in_every_part() -> None:
    assert sample_seed(0, 1, "chain/17", 2) == 413058873
    parts = [(0, 1, "a", 2), (1, 1, "a", 2), (0, 2, "a", 2), (0, 1, "b", 2), (0, 1, "a", 3), (0, 12, "a", 2)]
    seeds = [sample_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    many = [sample_seed(3, i, f"p{p}", s) for i in range(10) for p in range(40) for s in range(5)]
    assert all(0 <= seed < 2**31 for seed in many) and len(set(many)) == len(many)
