"""Adapters on bare parameters (PEFT's `target_parameters`): those of experts, [experts, ., .].

PEFT wraps a module once for each of its parameters, the first one innermost, and saves the matrices of all experts in
one: A [experts * r, in], an expert's rows together, and B [out, r * experts], an expert's columns apart.

    W[e] + scale * B[e] A[e], or its transpose where a model stores experts as [in, out]

Where a base's files hold experts one by one, or a layer that is one in the model as several, the change of the whole
parameter is taken apart by transformers' own conversion, as it takes apart the parameter itself when it saves a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from byeori.errors import ModelError
from byeori.model.opened import Opened, Source, read

Shapes = Mapping[str, tuple[int, ...]]


def wrappers(config: Mapping[str, Any], shapes: Shapes) -> dict[str, str]:
    """Return {module, as an adapter's file names it: the parameter that it wraps}. shapes: of the base's parameters."""
    wanted = tuple(config.get("target_parameters") or ())
    inside: dict[str, list[str]] = {}
    for name in shapes:
        if any(f".{name}".endswith(f".{ending}") for ending in wanted):
            inside.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        module + ".base_layer" * (len(names) - 1 - at): name
        for module, names in inside.items()
        for at, name in enumerate(names)
    }


def factors(change: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L [experts, rows, r] and R [experts, r, columns] of an `adapter_changes.Change`, in float32."""
    a, b = read(change.a).float(), read(change.b).float()
    a = a.view(change.experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, change.experts).permute(2, 0, 1)
    return (a.transpose(1, 2), b.transpose(1, 2)) if change.transposed else (b, a)


def whole_change(change: Any) -> torch.Tensor:
    """Return what a change adds to a parameter, in float32."""
    left, right = factors(change) if change.experts else (read(change.b).float(), read(change.a).float())
    added: torch.Tensor = change.scale * (left @ right)
    return added


@dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """Numbers of a parameter that transformers makes of several tensors of the files.

    keys: these tensors. load: reads the numbers of the whole parameter. model: transformers', without weights.
    """

    parameter: str
    keys: tuple[str, ...]
    load: Callable[[], torch.Tensor]
    model: Any

    def of(self, key: str) -> torch.Tensor:
        """Return those of one tensor of the files, in float32.

        Raises:
            ModelError: if transformers would save the parameter under other names.
        """
        return _taken_apart(self)[key].float()

    def opened(self, sources: Mapping[str, Source]) -> dict[str, Opened]:
        """Return the tensors of the files with these numbers. sources: the files' own."""
        own = {key: sources[key] for key in self.keys}
        return {
            key: Opened(name=key, dtype=source.dtype, shape=source.shape, load=partial(self.of, key))
            for key, source in own.items()
        }


@functools.lru_cache(maxsize=4)  # a layer's two parameters, whose tensors alternate in the files, and their changes
def _taken_apart(fused: Fused) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(fused.model, {fused.parameter: fused.load()})
    if set(found) != set(fused.keys):
        raise ModelError(
            f"{fused.parameter} is stored as {fused.keys[0]} and others, and transformers would save it as "
            f"{next(iter(found))}; serve the adapter unmerged"
        )
    return found
