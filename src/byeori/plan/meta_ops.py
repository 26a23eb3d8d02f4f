"""Operations on the meta device with their results remembered: PyTorch infers shapes in Python, and models repeat.

An operation is remembered by the shapes, strides and types of its tensors, its other arguments and the default type.
Only operations that make new tensors are: views and whatever shares storage with an argument run as usual. One that
writes into its arguments has nothing to do without numbers, and returns them. It makes a rehearsal three times faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_GROUPED = torch.ops.aten._grouped_mm.default
_RESIZING = {_ATEN.resize_, _ATEN.resize_as_, _ATEN.set_}
_PLAIN = {int, bool, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_Recipe = tuple[str, Any]  # ("tensor", (shape, stride, type)), ("several", (kind, parts)) or ("value", itself)

_UNKNOWN: Any = object()
_remembered: dict[Any, _Recipe | None] = {}
# By the id of the operation, whose own hash is Python code: the operation (so that its id is not reused), its kind, and
# which arguments it returns.
_kinds: dict[int, tuple[Any, str, tuple[int, ...]]] = {}


class Mode(TorchDispatchMode):
    """A dispatch mode without compiled code, so that PyTorch need not disable its compiler at every operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Remembering(Mode):
    """Inside it, results of operations on the meta device are remembered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return `func(*args, **kwargs)`; it really runs if a tensor is on another device than meta."""
    known = _kinds.get(id(func))
    if known is None:
        known = _kinds[id(func)] = func, *_kind(func)
    _, kind, written = known
    if kind == "other":
        return func(*args, **kwargs)
    try:
        key = (
            id(func),
            torch.get_default_dtype(),
            tuple([_signature(value) for value in args]),
            tuple([(name, _signature(value)) for name, value in kwargs.items()]) if kwargs else (),
        )
        recipe = _remembered.get(key, _UNKNOWN)
    except (TypeError, _Elsewhere):
        return func(*args, **kwargs)
    if kind == "writes":
        return _returned(args, written)
    if recipe is _UNKNOWN:
        out = _grouped(args, kwargs) if func is _GROUPED else func(*args, **kwargs)
        taken = {tensor.untyped_storage()._cdata for tensor in tensors((args, tuple(kwargs.values())))}
        _remembered[key] = _recipe(out, taken)
        return out
    return func(*args, **kwargs) if recipe is None else _from_recipe(recipe)


def _grouped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Grouped products of any type and size; the meta device knows only what a GPU multiplies in bfloat16."""
    first, second = args[:2]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    groups = 0 if offsets is None else len(offsets)
    rows = {
        (2, 2): (groups, first.shape[0]),
        (2, 3): (first.shape[0],),
        (3, 2): (first.shape[1],),
        (3, 3): tuple(first.shape[:2]),
    }
    return first.new_empty(*rows[first.dim(), second.dim()], second.shape[-1])


class _Elsewhere(Exception):
    """An argument is not on the meta device."""


def _kind(func: Any) -> tuple[str, tuple[int, ...]]:
    """new, writes (with the positions of the returned arguments), or other."""
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    if not any(aliases) and not any(result.alias_info for result in schema.returns):
        return ("other" if func.is_view or func.overloadpacket is _ATEN._local_scalar_dense else "new"), ()
    if func.is_view or func.overloadpacket in _RESIZING or any(a.kwarg_only and a.alias_info for a in schema.arguments):
        return "other", ()
    places = []
    for result in schema.returns:
        same = [at for at, alias in enumerate(aliases) if alias and alias.is_write and _same(alias, result.alias_info)]
        if len(same) != 1:
            return "other", ()
        places += same
    return "writes", tuple(places)


def _same(alias: Any, other: Any) -> bool:
    return other is not None and bool(alias.before_set & other.before_set)


def _returned(args: tuple[Any, ...], places: tuple[int, ...]) -> Any:
    written = tuple(args[place] for place in places)
    return written[0] if len(written) == 1 else written or None


def _signature(value: Any) -> Any:
    """Hashable, and equal only for arguments that give the same shapes.

    Raises:
        _Elsewhere: if a tensor is not on the meta device. TypeError: if an argument is of no known type.
    """
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        if not value.is_meta:
            raise _Elsewhere
        return value.shape, value.stride(), value.dtype
    if kind is list or kind is tuple or kind is torch.Size:
        return tuple([_signature(item) for item in value])
    if kind in _PLAIN:
        return kind, value
    raise _Elsewhere if isinstance(value, torch.Tensor) else TypeError


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value of nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def _recipe(out: Any, taken: set[int]) -> _Recipe | None:
    """How to make an equal result; None unless it consists of new meta tensors that fill their storages."""
    if isinstance(out, (list, tuple)):
        parts = [_recipe(item, taken) for item in out]
        return None if any(part is None for part in parts) else ("several", (type(out), parts))
    if not isinstance(out, torch.Tensor):
        return "value", out
    storage = out.untyped_storage()
    again = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    whole = out.storage_offset() == 0 and storage.nbytes() == again.untyped_storage().nbytes()
    new = out.device.type == "meta" and type(out) is torch.Tensor and storage._cdata not in taken
    return ("tensor", (out.shape, out.stride(), out.dtype)) if whole and new else None


def _from_recipe(recipe: _Recipe) -> Any:
    kind, value = recipe
    if kind == "several":
        return value[0](map(_from_recipe, value[1]))
    if kind == "value":
        return value
    shape, stride, dtype = value
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
