"""Tests: unit, distributed (gloo ranks), slurm (a real test cluster), end to end, gpu."""
