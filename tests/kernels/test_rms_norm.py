"""The fused RMS norm against the models' own, in float64, and its memory of what it must not touch."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from byeori.kernels.rms_norm import fuse_norms


def _norm(kind: type[torch.nn.Module], size: int, eps: float) -> torch.nn.Module:
    torch.manual_seed(0)
    module = kind(size, eps=eps).double()
    torch.nn.init.normal_(module.weight, mean=3.0)
    return module.requires_grad_(False)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_output_and_gradient_equal_the_formula(kind: type[torch.nn.Module]) -> None:
    module = _norm(kind, 12, 1e-5)
    scale = module.weight if kind is LlamaRMSNorm else 1 + module.weight
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    (wanted,) = torch.autograd.grad(expected, x, grad)
    assert fuse_norms(module) == 1
    found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], wanted, rtol=1e-12, atol=1e-12)


def test_a_norm_over_a_transposed_view_is_right() -> None:
    module = _norm(Gemma3RMSNorm, 8, 1e-6)
    x = torch.randn(1, 5, 3, 8, dtype=torch.float64).transpose(1, 2)
    expected = module(x)
    fuse_norms(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_no_further_from_float64_than_the_models_own() -> None:
    exact = _norm(Gemma3RMSNorm, 640, 1e-6)
    x = torch.randn(64, 640)
    wanted = exact(x.double())
    low = _norm(Gemma3RMSNorm, 640, 1e-6).bfloat16()
    own = (low(x.bfloat16()).double() - wanted).abs().mean()
    fuse_norms(low)
    assert (low(x.bfloat16()).double() - wanted).abs().mean() <= own * 1.001


def test_trained_norms_and_other_kinds_are_left_alone() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3

    assert fuse_norms(OddRMSNorm(8).requires_grad_(False)) == 0
    assert fuse_norms(LlamaRMSNorm(8)) == 0
    assert fuse_norms(torch.nn.LayerNorm(8).requires_grad_(False)) == 0
