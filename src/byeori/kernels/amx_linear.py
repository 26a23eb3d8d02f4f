"""Products with frozen matrices and their adapters, in one pass on a CPU with matrix units (linear.c).

PyTorch's are as fast, but make new code for every new number of rows, 3 to 20 ms of it where there are matrix units,
and an adapter is a pass of its own over the output.

    x [T, k], w [k, n], or turned [n, k]
"""

from __future__ import annotations

import torch

from byeori.kernels import native

# With longer rows not even a few columns of a matrix fit the second cache; for fewer rows (a word at a time) it does
# not pay to bring a matrix into tiles.
_LONGEST, _FEWEST = 8192, 16


def takes(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the functions below are to be used for these."""
    fits = x.dtype == torch.bfloat16 and x.shape[0] >= _FEWEST and 0 < x.shape[1] <= _LONGEST
    return native.tiles() == 2 and fits and native.runs(x, w)


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    turned: bool,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    scale: float = 1.0,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """x w + h up [T, n], added to `into` where that is given.

    down [k, r], or turned [r, k]: h becomes scale x down. up [r, n], or turned [n, r], with h [T, r].
    """
    n = w.shape[0] if turned else w.shape[1]
    y = x.new_empty(len(x), n) if into is None else into
    r = 0 if h is None else h.shape[1]
    native.call(
        "linear", x, w, down, up, h, y, len(x), n, x.shape[1], r, int(turned), int(into is not None), float(scale)
    )
    return y


def times(x: torch.Tensor, w: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """x w, added to `into` where that is given, by whatever takes them."""
    if takes(x, w):
        return product(x, w, turned=False, into=into)
    return x @ w if into is None else into.addmm_(x, w)


def outer(u: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale u^T x [r, k] in float32, for u [T, r] and x [T, k]: the gradient of one of an adapter's matrices."""
    out = torch.empty(u.shape[1], x.shape[1], device=x.device)
    native.call("outer", u, x, out, *u.shape, x.shape[1], float(scale))
    return out
