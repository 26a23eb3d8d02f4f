"""Products with frozen matrices and their adapters in one pass, on a CPU with AMX units (csrc/linear.c).

PyTorch's products are as fast, but with AMX oneDNN compiles 3 to 20 ms for every new number of rows, and an adapter
is a pass of its own over the output.

    x [T, k], w [k, n], or transposed [n, k]
"""

from __future__ import annotations

import torch

from byeori.kernels import native

# For longer rows not even a few columns of a matrix fit the second cache; for fewer rows (generation, one token at a
# time) bringing a matrix into tiles does not pay.
_LONGEST, _FEWEST = 8192, 16


def supports(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Return whether the functions below accept these."""
    fits = x.dtype == torch.bfloat16 and x.shape[0] >= _FEWEST and 0 < x.shape[1] <= _LONGEST
    return native.tiles() == 2 and fits and native.supports(x, w)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    transposed: bool,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    scale: float = 1.0,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x w + h up [T, n], added to `into` if that is given.

    down [k, r], or transposed [r, k]: h becomes scale x down. up [r, n], or transposed [n, r], with h [T, r].
    """
    n = w.shape[0] if transposed else w.shape[1]
    y = x.new_empty(len(x), n) if into is None else into
    r = 0 if h is None else h.shape[1]
    sizes = len(x), n, x.shape[1], r
    native.call("linear", x, w, down, up, h, y, *sizes, int(transposed), int(into is not None), float(scale))
    return y


def matmul(x: torch.Tensor, w: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return x w, added to `into` if that is given; by PyTorch where the kernel does not support it."""
    if supports(x, w):
        return linear(x, w, transposed=False, into=into)
    return x @ w if into is None else into.addmm_(x, w)


def outer(u: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return scale u^T x [r, k] in float32, for u [T, r] and x [T, k]: the gradient of one of an adapter's matrices."""
    out = torch.empty(u.shape[1], x.shape[1], device=x.device)
    native.call("outer", u, x, out, *u.shape, x.shape[1], float(scale))
    return out
