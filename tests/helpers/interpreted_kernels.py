"""The GPU kernels in Triton's interpreter: run as a module with TRITON_INTERPRET=1; prints the largest errors."""

import json
import sys
from typing import Any

import torch

from megatron_vcppo.algo import gae_kernel_gpu
from megatron_vcppo.algo.gae import gae_reference
from megatron_vcppo.mcore import logprob_rows_cpu, logprob_rows_gpu


def gae() -> float:
    """Against the oracle: gaps, empty rows, λ per row, bootstrap values, several blocks, lengths that none divides."""
    gae_kernel_gpu._BLOCK = 8
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for num_tokens, share in ((1, 1.0), (8, 1.0), (29, 0.6), (16, 0.0), (37, 0.9)):
        rewards, values = torch.randn(2, 3, num_tokens, generator=generator, dtype=torch.float64)
        mask = torch.rand(3, num_tokens, generator=generator) < share
        lams = (torch.tensor([0.0, 0.95, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64))
        inputs = {"rewards": rewards, "values": values, "mask": mask, "lam_actor": lams[0], "lam_critic": lams[1]}
        bootstrap_values = torch.randn(3, generator=generator, dtype=torch.float64)
        exact = gae_reference(**inputs, gamma=0.99, bootstrap_values=bootstrap_values)
        got = gae_kernel_gpu.gae_rows(**inputs, gamma=0.99, bootstrap_values=bootstrap_values)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(got, exact, strict=True)))
    return worst


def logprobs(dtype: torch.dtype) -> float:
    """Against the CPU's: columns of padding, labels elsewhere, large logits, -inf, a width that is no block's."""
    logprob_rows_gpu._BLOCK = 16
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(5, 50, generator=generator) * torch.tensor([1, 1, 300, 3, 10])[:, None]).to(dtype)
    local, mine = torch.tensor([0, 5, 44, 3, 17]), torch.tensor([True, True, True, False, True])
    columns, scale = 45, 1 / 0.7
    peak = logits[:, :columns].float().amax(1) * scale
    logits[0, 7] = -torch.inf
    at = {"logits": logits, "local": local, "mine": mine, "columns": columns, "scale": scale}
    cpu, gpu = (rows.row_sums(**at, peak=peak) for rows in (logprob_rows_cpu, logprob_rows_gpu))
    cpu[1, 0] = gpu[1, 0]  # there the CPU's is NaN
    errors = [((cpu - gpu).abs() / (1 + cpu.abs())).max()]
    logits[0, 7] = 0
    for grad_entropy in (None, torch.randn(5, generator=generator)):
        arguments: dict[str, Any] = {
            **at,
            "log_norm": peak + 1,
            "entropy": torch.rand(5, generator=generator),
            "grad_logprob": torch.randn(5, generator=generator),
            "grad_entropy": grad_entropy,
        }
        gpu = logprob_rows_gpu.row_gradients(**arguments)
        arguments["logits"] = logits.clone()  # the CPU's are overwritten
        cpu = logprob_rows_cpu.row_gradients(**arguments)
        assert gpu.dtype == dtype and bool((gpu[:, columns:] == 0).all())
        errors.append((cpu.float() - gpu.float()).abs().max())
    return float(torch.stack(errors).max())


if __name__ == "__main__":
    json.dump({"gae": gae(), "float32": logprobs(torch.float32), "bfloat16": logprobs(torch.bfloat16)}, sys.stdout)
