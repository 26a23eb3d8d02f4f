"""A model that computes with weights which are read from their files while it runs, one layer at a time.

    config ──> model on the meta device ── each layer, before it runs ──> its weights in float32 ── after it ──> gone

A linear layer reads its weight in blocks of rows, an embedding only the rows of its tokens; every other layer, and
those that PEFT merges, holds its own weights while it runs. Memory: activations and the largest of those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from byeori.export import base_names
from byeori.export.base_names import Names
from byeori.model.opened import Opened, Source, read, row_blocks, some_rows
from byeori.model.quantize import reads_weight

Load = Callable[[], torch.Tensor]


class StreamedLinear(torch.nn.Linear):
    """A linear layer that reads its weight in blocks of rows; one that is not on the meta device is used as it is."""

    source: Source
    streamed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b."""
        if not self.weight.is_meta:
            return super().forward(input)
        parts = [
            torch.nn.functional.linear(input, block.float().view(last - first, -1).to(input.device))
            for first, last, block in row_blocks(self.source)
        ]
        output = torch.cat(parts, -1)
        return output if self.bias is None else output + self.bias


def streamed_model(
    folder: Path, names: Names, sources: Mapping[str, Source], *, device: torch.device, vocabulary: int | None = None
) -> Any:
    """Return the model of a folder's config.json with weights that are read from `sources` while it runs.

    sources: the tensors by parameter; those that transformers makes of several by their names in the files.
    vocabulary: the number of tokens, if it is not that of config.json.

    Raises:
        ModelError: if transformers does not know the model.
        KeyError: if a parameter has no source.
    """
    model = base_names.empty_model(folder, buffers=True, **({"vocab_size": vocabulary} if vocabulary else {}))
    for path, module in model.named_modules():
        loads: dict[str, Load] = {}
        for short, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{short}" if path else short
            module._parameters[short] = _meta(parameter)
            source = _source(name, names, sources)
            above, _, own = path.rpartition(".")
            if isinstance(module, torch.nn.Conv1d) or reads_weight(model.get_submodule(above), own):
                # layers that carry a state read these weights themselves
                whole = load_parameter(model, name, names, sources)().to(device)
                module._parameters[short] = torch.nn.Parameter(whole, requires_grad=False)
            elif type(module) in (torch.nn.Linear, StreamedLinear) and short == "weight" and source:
                module.__class__ = StreamedLinear
                module.source = source
            else:
                loads[short] = load_parameter(model, name, names, sources)
        for short, buffer in module._buffers.items():
            name = f"{path}.{short}" if path else short
            if buffer is not None:
                buffer = read(sources[name]).to(buffer.dtype) if name in names.stored else buffer
                module._buffers[short] = buffer.to(device)
        if loads:
            module.byeori_loads, module.byeori_filled, module.byeori_held = loads, set(), False
            rows = isinstance(module, torch.nn.Embedding) and _source(f"{path}.weight", names, sources)
            before = partial(_fill_rows, device=device, source=rows) if rows else partial(_fill, device=device)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(lambda module, args, output: _empty(module))
    return model.eval()


def _meta(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)


def _source(name: str, names: Names, sources: Mapping[str, Source]) -> Source | None:
    """The tensor of a parameter that is one tensor in the files."""
    return sources.get(name) or sources.get(names.tied.get(name, name))


def load_parameter(model: Any, name: str, names: Names, sources: Mapping[str, Source]) -> Load:
    """Return what reads a parameter of a model without weights in float32, converted as transformers converts it."""
    if source := _source(name, names, sources):
        return lambda: read(source).float()
    keys, converter = names.fused[name]
    parts = {key: sources[key] for key, _ in keys}

    def load() -> torch.Tensor:
        mine = copy.deepcopy(converter)
        for key, pattern in keys:
            mine.add_tensor(name, key, pattern, partial(_read_float, parts[key]))
        made = mine.convert(name, model=model, config=model.config)[name]
        return made[0] if isinstance(made, list) else made

    return load


def _read_float(source: Source) -> torch.Tensor:
    return read(source).float()


def _fill(module: Any, args: Any = None, *, device: torch.device) -> None:
    for short, load in module.byeori_loads.items():
        parameter = module._parameters.get(short)  # PEFT hides those of experts for a forward pass
        if parameter is not None and parameter.is_meta:
            module._parameters[short] = torch.nn.Parameter(load().to(device), requires_grad=False)
            module.byeori_filled.add(short)


def _fill_rows(module: Any, args: tuple[torch.Tensor, ...], *, device: torch.device, source: Source) -> None:
    """Give an embedding the rows that it will look up; memory that is never written takes no room."""
    if not module.weight.is_meta:
        return
    weight = torch.empty(module.weight.shape, device=device)
    rows = sorted({min(int(token), source.shape[0] - 1) for token in args[0].unique().tolist()})
    weight[rows] = some_rows(source, rows).float().to(device)
    module._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    module.byeori_filled.add("weight")


def _empty(module: Any) -> None:
    """Let go of what was loaded, but not of what an adapter brought."""
    if not module.byeori_held:
        for short in module.byeori_filled:
            module._parameters[short] = _meta(module._parameters[short])
        module.byeori_filled.clear()


def fill(layer: Any, device: torch.device) -> None:
    """Load all weights of a layer, which keeps them until `empty`."""
    for part in layer.modules():
        if isinstance(part, StreamedLinear) and part.weight.is_meta:
            weight = read(part.source).float().view(part.weight.shape)
            part.weight, part.streamed = torch.nn.Parameter(weight.to(device), requires_grad=False), True
        if hasattr(part, "byeori_loads"):
            part.byeori_held = True
            _fill(part, device=device)


def empty(layer: Any) -> None:
    """Let go of what `fill` loaded."""
    for part in layer.modules():
        if isinstance(part, StreamedLinear) and part.streamed:
            part.weight, part.streamed = _meta(part.weight), False
        if hasattr(part, "byeori_loads"):
            part.byeori_held = False
            _empty(part)


def largest(model: Any) -> int:
    """Return the bytes of the largest weight that a layer holds whole while it runs, in float32."""
    sizes = [
        sum(module._parameters[short].numel() * 4 for short in module.byeori_loads)
        for module in model.modules()
        if hasattr(module, "byeori_loads") and not isinstance(module, torch.nn.Embedding)
    ]
    opened = [
        4 * part.source.count
        for part in model.modules()
        if isinstance(part, StreamedLinear) and isinstance(part.source, Opened)
    ]
    return max([*sizes, *opened], default=0)
