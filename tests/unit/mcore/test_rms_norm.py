"""The norm with its own backward pass on a CPU, against torch's in double precision."""

import pytest
import torch
import torch.nn.functional as F

from megatron_vcppo.mcore import cpu_shim

EPS = 1e-3


@pytest.mark.parametrize("shape", [(7, 1, 16), (5, 1, 3, 8)], ids=["hidden states", "heads"])
def test_equals_torchs_with_its_gradients(shape: tuple[int, ...]) -> None:
    cpu_shim.install()
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_vcppo.mcore.layers import RMSNorm

    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    norm = RMSNorm(config, shape[-1], eps=EPS)
    norm.weight.data.normal_()
    # Heads come as a part of what one matrix product made.
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]].requires_grad_()
    grad = torch.randn(shape)
    actual = norm(x)
    actual_grads = torch.autograd.grad(actual, (x, norm.weight), grad)
    wide = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = F.rms_norm(wide[0], shape[-1:], wide[1], EPS)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    for ours, theirs in zip((actual, *actual_grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
