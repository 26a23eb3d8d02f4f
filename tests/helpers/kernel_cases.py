"""What kernels compute, on a CPU (csrc/kernels.c) or a GPU (triton_kernels.py), against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from byeori.kernels import dispatch, gated_mlp, lora_linear, native, qkv_rope, rms_norm, switches
from byeori.kernels.dropout import SeededDropout

needs_compiler = pytest.mark.skipif(native.problem() is not None, reason="no C kernels")
Case = tuple[Any, list[torch.Tensor]]


def both(function: Any, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients of a function with the kernels, and without them in float64."""
    out = []
    for on in (True, False):
        given = [tensor if on else tensor.double() for tensor in tensors]
        given = [tensor.detach().clone().requires_grad_() for tensor in given]
        with switches.using(switches.Switches(kernels=on)):
            found = function(*given)
            grad = torch.linspace(-1, 1, found.numel(), device=found.device).reshape(found.shape).to(tensors[0].dtype)
            out.append([found, *torch.autograd.grad(found, given, grad.to(found.dtype))])
    return out[0], out[1]


def cases(dtype: torch.dtype, size: int, device: torch.device) -> list[Case]:
    """Functions that take kernels, each with the tensors whose gradients it has."""
    torch.manual_seed(size)
    x, gate = ((3 * torch.randn(3, 5, size)).to(device, dtype) for _ in range(2))
    cos, sin = torch.randn(2, 3, size).to(device, dtype)
    scale = torch.randn(size).to(device)
    head_norm = qkv_rope.HeadNorm(scale=scale, eps=1e-3)

    def of(x: torch.Tensor, times: int = 1) -> lora_linear.Projection:
        return lora_linear.Projection(weight=torch.eye(size, dtype=x.dtype, device=device).repeat(times, 1), bias=None)

    def as_norm(x: torch.Tensor) -> torch.Tensor:
        return rms_norm._RmsNorm.apply(x, scale.to(torch.promote_types(x.dtype, torch.float32)), 1e-3)

    def as_rope(x: torch.Tensor, known: Any) -> torch.Tensor:
        rope, parts = (cos.to(x.dtype), sin.to(x.dtype)), [of(x, times=2)] * 3  # two heads
        return qkv_rope.compute(x[:, 0], None, (rope, rope), size, parts, (known, None))[0]

    def as_drop(x: torch.Tensor) -> torch.Tensor:
        w, a, b = (torch.eye(size, dtype=x.dtype, device=device) for _ in range(3))
        return lora_linear._FusedLora.apply(x, w, None, a, b, 1.0, SeededDropout(0.3, 2**31 - 5), None)

    out: list[Case] = [
        (as_drop, [x]),
        (as_norm, [x]),
        (lambda x: as_norm(x[None].transpose(1, 2)), [x]),  # heads, in memory behind tokens
        (lambda x: as_rope(x, head_norm), [x]),
        (lambda x: as_rope(x, None), [x]),
    ]
    for act in gated_mlp._ACTIVATIONS:
        out.append((lambda x, act=act: gated_mlp._apply(x, act, [of(x)] * 3), [gate]))
    return out


def check(dtype: torch.dtype, size: int, device: torch.device) -> None:
    for function, given in cases(dtype, size, device):
        ours, right = both(function, *given)
        for one, other in zip(ours, right, strict=True):
            assert one.dtype == dtype
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            assert float((one - other).detach().norm() / other.detach().norm()) < limit


def check_nan(device: torch.device) -> None:
    """A NaN goes through every kernel, and stays in its row."""
    bad, one = torch.ones(2, 4, device=device), torch.ones(2, 4, device=device)
    bad[0, 1] = torch.nan
    row = [torch.zeros(2, device=device) for _ in range(5)]
    out = [torch.zeros(2, 4, device=device) for _ in range(3)]
    dispatch.call("norm", bad, one[0], 1e-6, out[0], row[0], 2, 4)
    dispatch.call("glu", bad, one, out[1], 1.0, 0.0, 2, 4)
    dispatch.call("rope", bad, one, one, None, 0.0, out[2], None, 2, 1, 4)
    ids, total = torch.zeros(2, dtype=torch.long, device=device), row[1]
    dispatch.call("online_softmax", bad.clone(), ids, row[2], row[3], total, row[4], 1.0, 2, 4)
    for found in (*out, total[:, None]):
        assert found[0].isnan().any()
        assert not found[1].isnan().any()
