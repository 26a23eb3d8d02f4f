"""Matrix products of bfloat16 on processors without units for it: in float32, a block at a time, rounded once.

PyTorch's own are made for processors that have such units. On others they take 7 to 450 times as long as float32's, by
the layout of the matrices: bfloat16 could not be used there, although weights and activations take half the memory.

    M rows, N columns, K summed over
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

# The longest side of a block. Three blocks in float32 are all the memory that a product takes, and a number is
# converted once for some 1,000 multiplications.
_SIDE = 2048
_WORKSPACE = 3 * 4 * _SIDE**2
# A product over no more than _THIN numbers (an adapter's rank) is little else than reading and writing: its blocks are
# of _STRIP rows, which stay in the processor's cache.
_THIN, _STRIP = 64, 256

# oneDNN, and PyTorch on top of it, keep the code of this many products for when their shapes come again, each 1,024 by
# itself; a micro-batch uses about 100. The bytes are measured: what a process holds grows by 256 KiB for each, by twice
# that where a block's rows are not filled, and by 593,000 of new shapes where there are matrix tiles.
_CACHE_SIZES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CACHED_PRODUCTS, _CODE_BYTES = 128, 620_000

_installed: list[torch.library.Library] = []
_FOR_CPU = "CPU"


def units() -> bool:
    """Whether the processor multiplies bfloat16."""
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def prepare(dtype: torch.dtype, device: torch.device) -> int:
    """Get this process ready for products of a type on a device; returns the bytes one takes besides its result."""
    if device.type != "cpu":
        return 0
    for name in _CACHE_SIZES:
        os.environ.setdefault(name, str(_CACHED_PRODUCTS))  # read at the first product
    if dtype != torch.bfloat16 or units():
        return 0
    install()
    return _WORKSPACE


def code_bytes(dtype: torch.dtype) -> int:
    """What the kept code of a CPU's products of a type takes; those of float32 are MKL's, which is there once."""
    return _CACHED_PRODUCTS * _CODE_BYTES if dtype == torch.bfloat16 and units() else 0


def install() -> None:
    """From now on, this process computes products of bfloat16 matrices on the CPU as above; others as before."""
    if _installed:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, product in _PRODUCTS.items():
            original = torch.library.get_kernel(f"aten::{name}", _FOR_CPU)
            library.impl(name, _either(product, original), _FOR_CPU, with_keyset=True)
    _installed.append(library)


def _either(product: Callable[..., torch.Tensor], original: Any) -> Callable[..., torch.Tensor]:
    def chosen(keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        left, right = args[-2:]
        one_row = left.shape[-2] == 1 and right.stride(-2) == 1  # PyTorch is twice as fast with these
        if left.dtype == right.dtype == args[0].dtype == torch.bfloat16 and not one_row:
            return product(*args, **kwargs)
        return original.call_boxed(keys, *args, **kwargs)

    return chosen


def _plain(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """left [M, K] @ right [K, N], or as many of both [B, M, K] and [B, K, N]."""
    return _into(_result(left, right, out), left, right)


def _added(
    kept: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha * left @ right + beta * kept, which may be smaller than the result."""
    result = _result(left, right, out)
    return _into(result, left, right, kept.expand(result.shape), beta=beta, alpha=alpha)


def _added_here(
    kept: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _into(kept, left, right, kept, beta=beta, alpha=alpha)


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(("mm", "mm.out", "bmm", "bmm.out"), _plain),
    **dict.fromkeys(("addmm", "addmm.out", "baddbmm", "baddbmm.out"), _added),
    **dict.fromkeys(("addmm_", "baddbmm_"), _added_here),
}


def _result(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    shape = (*left.shape[:-1], right.shape[-1])
    return left.new_empty(shape) if out is None else out.resize_(shape)


def _into(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor | None = None, **factors: float
) -> torch.Tensor:
    """_fill, for one matrix or for each of several.

    Raises:
        RuntimeError: other shapes than PyTorch takes.
    """
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise RuntimeError(f"matrices of shapes {tuple(left.shape)} and {tuple(right.shape)} cannot be multiplied")
    if out.dim() == 2:
        return _fill(out, left, right, kept, **factors)
    for one in range(len(out)):
        _fill(out[one], left[one], right[one], None if kept is None else kept[one], **factors)
    return out


def _fill(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    kept: torch.Tensor | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """out [M, N] = alpha * left [M, K] @ right [K, N] + beta * kept [M, N]; kept may be out."""
    height = _SIDE if left.shape[1] > _THIN else _STRIP
    for columns in _parts(right.shape[1], _SIDE):
        for rows in _parts(left.shape[0], height):
            total = _block(left[rows], right[:, columns])
            if alpha != 1:
                total *= alpha
            if kept is not None and beta != 0:
                total.add_(kept[rows, columns], alpha=beta)
            out[rows, columns] = total
    return out


def _block(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [m, K] @ right [K, n] in float32."""
    first, *others = _parts(left.shape[1], _SIDE) or [slice(0, 0)]
    total = left[:, first].float() @ right[first].float()
    for summed in others:
        total.addmm_(left[:, summed].float(), right[summed].float())
    return total


def _parts(length: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]
