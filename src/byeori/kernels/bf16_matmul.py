"""Matrix products of bfloat16 on processors without units for it: in float32, block by block, rounded once.

There PyTorch's own bfloat16 products take 7 to 450 times as long as its float32 ones, by the layout of the matrices,
and bfloat16 could not be used, although weights and activations take half the memory.

    M rows, N columns, K summed over
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# The longest side of a block. A product needs memory for three blocks in float32, and a number is converted once for
# about 1,000 multiplications.
_SIDE = 2048
_WORKSPACE = 3 * 4 * _SIDE**2
# A product with K up to _THIN (an adapter's rank) is little more than reading and writing: its blocks have _STRIP rows,
# which stay in the processor's cache.
_THIN, _STRIP = 64, 256

# oneDNN, and PyTorch on top of it, cache the code of this many products, each 1,024 by default; a micro-batch uses
# about 100. Measured: the process grows by 256 KiB for each, by twice that where a block's rows are not full, and by
# 593,000 bytes for each new shape on processors with AMX.
_CACHE_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CACHED_PRODUCTS, _CODE_BYTES = 128, 620_000

_CPU = "CPU"
_installed = False


def units() -> bool:
    """Return whether the processor multiplies bfloat16."""
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def needed(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products of this type on this device are computed as above."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not units()


def workspace_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """Return the memory that such a product needs besides its result."""
    return _WORKSPACE if needed(dtype, device) else 0


def code_bytes(dtype: torch.dtype) -> int:
    """Return the memory of oneDNN's cached code for products of a type; MKL's float32 code is there once."""
    return _CACHED_PRODUCTS * _CODE_BYTES if dtype == torch.bfloat16 and units() else 0


@contextmanager
def prepared(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Compute products of this type on this device as above inside, and let oneDNN cache few of them.

    The variables are read at a product's first use, which is why they are set around it. Leaving puts PyTorch's own
    products and the environment back; entering and leaving takes about 0.3 ms.
    """
    if device.type != "cpu":
        yield
        return
    missing = [name for name in _CACHE_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, str(_CACHED_PRODUCTS)))
    try:
        with ExitStack() as stack:
            if needed(dtype, device):
                stack.enter_context(installed())
            yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def installed() -> Iterator[None]:
    """Override PyTorch's products of bfloat16 matrices on the CPU inside; others are computed as before."""
    global _installed
    if _installed:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    _installed = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, product in _PRODUCTS.items():
                original = torch.library.get_kernel(f"aten::{name}", _CPU)
                library.impl(name, _override(product, original), _CPU, with_keyset=True)
        yield
    finally:
        _installed = False
        del library  # its finalizer restores PyTorch's own kernels


def _override(product: Callable[..., torch.Tensor], original: Any) -> Callable[..., torch.Tensor]:
    def choose(keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        left, right = args[-2:]
        one_row = left.shape[-2] == 1 and right.stride(-2) == 1  # PyTorch is twice as fast with these
        if left.dtype == right.dtype == args[0].dtype == torch.bfloat16 and not one_row:
            return product(*args, **kwargs)
        return original.call_boxed(keys, *args, **kwargs)

    return choose


def _matmul(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """left [M, K] @ right [K, N], or a batch of both: [B, M, K] and [B, K, N]."""
    return _multiply(_result(left, right, out), left, right)


def _addmm(
    added: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha * left @ right + beta * added, which is broadcast to the result."""
    result = _result(left, right, out)
    return _multiply(result, left, right, added.expand(result.shape), beta=beta, alpha=alpha)


def _addmm_inplace(
    added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _multiply(added, left, right, added, beta=beta, alpha=alpha)


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(("mm", "mm.out", "bmm", "bmm.out"), _matmul),
    **dict.fromkeys(("addmm", "addmm.out", "baddbmm", "baddbmm.out"), _addmm),
    **dict.fromkeys(("addmm_", "baddbmm_"), _addmm_inplace),
}


def _result(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    shape = (*left.shape[:-1], right.shape[-1])
    return left.new_empty(shape) if out is None else out.resize_(shape)


def _multiply(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, added: torch.Tensor | None = None, **factors: float
) -> torch.Tensor:
    """`_multiply_one`, for one matrix or each of a batch.

    Raises:
        RuntimeError: if the shapes cannot be multiplied.
    """
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise RuntimeError(f"matrices of shapes {tuple(left.shape)} and {tuple(right.shape)} cannot be multiplied")
    if out.dim() == 2:
        return _multiply_one(out, left, right, added, **factors)
    for one in range(len(out)):
        _multiply_one(out[one], left[one], right[one], None if added is None else added[one], **factors)
    return out


def _multiply_one(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    added: torch.Tensor | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """out [M, N] = alpha * left [M, K] @ right [K, N] + beta * added [M, N]; added may be out."""
    height = _SIDE if left.shape[1] > _THIN else _STRIP
    for columns in _slices(right.shape[1], _SIDE):
        for rows in _slices(left.shape[0], height):
            total = _block(left[rows], right[:, columns])
            if alpha != 1:
                total *= alpha
            if added is not None and beta != 0:
                total.add_(added[rows, columns], alpha=beta)
            out[rows, columns] = total
    return out


def _block(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [m, K] @ right [K, n] in float32."""
    first, *others = _slices(left.shape[1], _SIDE) or [slice(0, 0)]
    total = left[:, first].float() @ right[first].float()
    for summed in others:
        total.addmm_(left[:, summed].float(), right[summed].float())
    return total


def _slices(length: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]
