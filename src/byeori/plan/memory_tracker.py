"""Which storages are alive at every moment of a piece of PyTorch code, and how many floating point operations it makes.

The mode sees every operation, on the meta device as on a real one, so what it counts there is what the same code
allocates here. Memory that a kernel allocates and frees inside one operation is not seen; for attention on a GPU
kernels/cuda_attention.py allocates as much in a rehearsal.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from byeori.plan import meta_ops

Source = tuple[str, str, str, str]  # part, module, operation, what it made


class Storage(NamedTuple):
    """A storage that is alive, its bytes and where they come from."""

    ref: weakref.ref[Any]
    size: int
    part: str
    source: Source | None


@dataclass(kw_only=True, slots=True)
class Peak:
    """The most that was alive in one segment of the code. parts: bytes by part, at that moment.

    alive: the storages of that moment; only where asked for.
    """

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    alive: list[Storage] = field(default_factory=list)

    def sources(self) -> tuple[Counter[Source], Counter[Source]]:
        """Return bytes and number of the storages by source."""
        sizes: Counter[Source] = Counter()
        counts: Counter[Source] = Counter()
        for storage in self.alive:
            if storage.source is not None:
                sizes[storage.source] += storage.size
                counts[storage.source] += 1
        return sizes, counts


class Tracker(meta_ops.Mode):
    """Counts storages by part and peaks by segment.

    block: every storage is rounded up to a multiple of this many bytes, as the device's allocator does.
    explain: record where the bytes of every peak come from.
    part: what new storages belong to. segment: the stretch of code whose peak is being measured. module: the one that
    runs.
    """

    def __init__(self, *, block: int = 1, explain: bool = False) -> None:
        super().__init__()
        self.block, self.explain = block, explain
        self.total, self.flops = 0, 0
        self.parts: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.part, self.module, self.segment = "weights", "", "before"
        self._alive: dict[int, Storage] = {}
        self.enter("before")

    def enter(self, segment: str) -> None:
        """From here on peaks belong to this segment; it may be entered again."""
        self.segment = segment
        self.peaks.setdefault(segment, Peak())
        self._record_peak()

    def assign(self, part: str, tensors: Iterable[torch.Tensor], module: str = "") -> None:
        """Count these tensors under a part, whether they were seen before or not."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if known := self._alive.get(key):
                self.parts[known.part] -= known.size
                self.parts[part] += known.size
                source = known.source and (part, *known.source[1:])
                self._alive[key] = known._replace(part=part, source=source)
            else:
                self._add(tensor, part, module, part)
        self._record_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = meta_ops.call(func, args, kwargs)
        for tensor in (out,) if type(out) is torch.Tensor else meta_ops.tensors(out):
            if tensor.untyped_storage()._cdata not in self._alive:
                self._add(tensor, self.part, self.module, func)
        if func.is_view:
            return out
        self._record_peak()
        count = _formula(func)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _add(self, tensor: torch.Tensor, part: str, module: str, made_by: Any) -> None:
        storage = tensor.untyped_storage()
        size = math.ceil(storage.nbytes() / self.block) * self.block
        if not size:
            return
        source = None
        if self.explain:
            shape = f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
            name = getattr(getattr(made_by, "overloadpacket", made_by), "__name__", str(made_by))
            source = (part, module, name, shape)
        key = storage._cdata
        self._alive[key] = Storage(weakref.ref(storage, functools.partial(self._freed, key)), size, part, source)
        self.total += size
        self.parts[part] += size

    def _freed(self, key: int, ref: Any) -> None:
        known = self._alive.get(key)
        if known is not None and known.ref is ref:
            del self._alive[key]
            self.total -= known.size
            self.parts[known.part] -= known.size

    def _record_peak(self) -> None:
        peak = self.peaks[self.segment]
        if self.total <= peak.total:
            return
        peak.total, peak.parts = self.total, dict(self.parts)
        if self.explain:
            peak.alive = list(self._alive.values())


@functools.cache
def _formula(func: Any) -> Callable[..., int] | None:
    packet = func.overloadpacket
    return _FORMULAS.get(packet) or flop_registry.get(packet)


def _product(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """[.., m, k] by [.., k, n], whatever it is added to; PyTorch's own counter skips the in-place forms."""
    a, b = [value for value in args if isinstance(value, torch.Tensor)][-2:]
    return 2 * a.numel() * b.shape[-1]


def _lengths_forward(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *args: Any, **kwargs: Any) -> int:
    """Sequences of different lengths, [T, H, D]; the meta device knows no lengths, so they count as equally long."""
    count = max(1, len(cu_q) - 1)
    n, m = len(query) / count, len(key) / count
    pairs = n * m - n * (n - 1) / 2 if kwargs.get("window_size_right") == 0 else n * m
    return int(2 * query.shape[1] * count * pairs * (query.shape[2] + value.shape[2]))


def _lengths_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *args: Any, **kwargs: Any
) -> int:
    return _lengths_forward(query, key, value, *args, **kwargs) * 5 // 2


def _grouped(a: Any, b: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Experts: a [S, K] in groups of rows, b [E, K, N]; or [K, S] by [S, N] in groups of columns, for a gradient."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.baddbmm_), _product),
    _ATEN._flash_attention_forward: _lengths_forward,
    _ATEN._flash_attention_backward: _lengths_backward,
    _ATEN._grouped_mm: _grouped,
}
