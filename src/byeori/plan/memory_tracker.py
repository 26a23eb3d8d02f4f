"""Which storages are alive at every moment of a piece of PyTorch code, and how many floating point operations it makes.

The mode sees every operation, on the meta device as on a real one, so what it counts there is what the same code
allocates here. Memory that a kernel takes and gives back inside one operation is not seen; for attention on a GPU
cuda_attention.py allocates as much in a rehearsal.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from byeori.plan import meta_ops

Source = tuple[str, str, str, str]  # part, module, operation, what it made


@dataclass(kw_only=True)
class Peak:
    """The most that was alive in one segment of the code. parts: bytes by part, at that moment."""

    total: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    sources: Counter[Source] | None = None
    counts: Counter[Source] | None = None


class Tracker(meta_ops.Mode):
    """Counts storages by part and peaks by segment.

    block: every storage is rounded up to a multiple of this many bytes, as the device's allocator does.
    explain: (segment, bytes) of a peak known from an earlier run of the same code; the storages alive at it are kept.
    part: what new storages belong to. segment: the stretch of code whose peak is being measured. where: the module.
    """

    def __init__(self, *, block: int = 1, explain: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.block, self.explain = block, explain
        self.total, self.flops = 0, 0
        self.parts: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.part, self.where, self.segment = "weights", "", "before"
        self._alive: dict[int, tuple[weakref.ref[Any], int, str, Source | None]] = {}
        self.enter("before")

    def enter(self, segment: str) -> None:
        """From here on peaks belong to this segment; it may be entered again."""
        self.segment = segment
        self.peaks.setdefault(segment, Peak())
        self._look()

    def own(self, part: str, tensors: Iterable[torch.Tensor], where: str = "") -> None:
        """These tensors belong to a part, whether they were seen before or not."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._alive:
                ref, size, before, source = self._alive[key]
                self.parts[before] -= size
                self.parts[part] += size
                self._alive[key] = (ref, size, part, source and (part, *source[1:]))
            else:
                self._add(tensor, part, where, part)
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = meta_ops.call(func, args, kwargs)
        for tensor in (out,) if type(out) is torch.Tensor else meta_ops.tensors(out):
            if tensor.untyped_storage()._cdata not in self._alive:
                self._add(tensor, self.part, self.where, func)
        if func.is_view:
            return out
        self._look()
        count = _formula(func)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _add(self, tensor: torch.Tensor, part: str, where: str, made_by: Any) -> None:
        storage = tensor.untyped_storage()
        size = math.ceil(storage.nbytes() / self.block) * self.block
        if not size:
            return
        source = None
        if self.explain is not None:
            shape = f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
            name = getattr(getattr(made_by, "overloadpacket", made_by), "__name__", str(made_by))
            source = (part, where, name, shape)
        key = storage._cdata
        self._alive[key] = (weakref.ref(storage, self._forget(key)), size, part, source)
        self.total += size
        self.parts[part] += size

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(ref: Any) -> None:
            found = self._alive.get(key)
            if found is not None and found[0] is ref:
                del self._alive[key]
                self.total -= found[1]
                self.parts[found[2]] -= found[1]

        return forget

    def _look(self) -> None:
        peak = self.peaks[self.segment]
        if self.total <= peak.total:
            return
        peak.total, peak.parts = self.total, Counter(self.parts)
        if self.explain == (self.segment, self.total):
            alive = [(entry[3], entry[1]) for entry in self._alive.values() if entry[3] is not None]
            peak.sources, peak.counts = Counter(), Counter(source for source, _ in alive)
            for source, size in alive:
                peak.sources[source] += size


@functools.cache
def _formula(func: Any) -> Callable[..., int] | None:
    packet = func.overloadpacket
    return _FORMULAS.get(packet) or flop_registry.get(packet)


def _product(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """[.., m, k] by [.., k, n], whatever it is added to; PyTorch's own counter passes over what is added in place."""
    a, b = [value for value in args if isinstance(value, torch.Tensor)][-2:]
    return 2 * a.numel() * b.shape[-1]


def _lengths_forward(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *args: Any, **kwargs: Any) -> int:
    """Sequences of different lengths, [T, H, D]; on the meta device they are taken as equally long."""
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
