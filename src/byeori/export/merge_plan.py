"""Plan a merge from names and shapes alone: what the adapter does to every tensor of the base.

    adapter's tensors ──> changes by parameter ─┐
    base's tensors, named as transformers does ─┴─> MergedModel, one MergedTensor for each tensor to write

Whatever cannot be merged exactly is rejected here, before a byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from byeori.artifacts import layout
from byeori.artifacts.saved_model import run_settings
from byeori.errors import ModelError
from byeori.export import expert_changes, streamed_model
from byeori.export.adapter_changes import Change, adapter_changes
from byeori.export.base_names import Names, parameter_names, untie
from byeori.export.quantized_base import TrainedOn
from byeori.model import opened as opening
from byeori.model import packed
from byeori.model.embedding_rows import is_embedding
from byeori.model.fingerprint import stored_tensors
from byeori.model.load import resolve_dtype
from byeori.model.opened import BYTES, FLOATS, Source
from byeori.model.quantize import BITSANDBYTES
from byeori.support.foreign_files import json_file

Progress = Callable[[int, int], None]
"""Called with (tensors done, total)."""

Onto = Literal["auto", "base", "opened"]


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """One tensor of the merged model. source: where its numbers come from. dtype: safetensors' name.

    parameter: its name in transformers' model; None if it has none there.
    """

    name: str
    parameter: str | None
    source: Source
    dtype: str
    change: Change | None

    @property
    def size(self) -> int:
        """Bytes in the merged files."""
        return self.source.size if self.dtype == self.source.dtype else self.source.count * BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A planned merge: all that a format needs to write the merged model.

    base, adapter: their folders. config: the adapter's. dtype: as asked for, `auto` or torch's name. untied: whether
    embedding and head were one tensor in the base and are two in the merged model. quantized: whether tensors stay as
    the base stores them, quantized. vocabulary: the number of tokens if the adapter changes it.
    trained: weights as training held them, if it held them quantized and they are not those that are merged into.
    onto: `base`, or `opened` for weights that were opened. plain: the base's tensors by parameter, without the adapter.
    """

    base: Path
    adapter: Path
    config: dict[str, Any]
    dtype: str
    tensors: list[MergedTensor]
    untied: bool
    names: Names
    quantized: bool = False
    vocabulary: int | None = None
    onto: str = "base"
    plain: dict[str, Source] = field(default_factory=dict)
    trained: Mapping[str, Source] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(item.size for item in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(item.source.count for item in self.tensors)


def plan(
    *,
    folder: Path,
    base: str,
    adapter: Path,
    config: dict[str, Any],
    dtype: str,
    onto: Onto = "auto",
    trained: TrainedOn | None = None,
) -> MergedModel:
    """Plan the merge of an adapter. folder: the base's; base: its name as given; config: the adapter's.

    onto: the weights that are changed: the base's, or those that training opened from 4 or 8 bit. auto is the base's,
    unless it is stored quantized. trained: the quantized base that training had, if it is another one.

    Raises:
        ModelError: if adapter and base do not belong together, or one is damaged or of a kind that cannot be merged.
    """
    raw = stored_tensors(folder)
    weights = packed.sources(folder, raw)
    opened = {name for name, source in weights.items() if isinstance(source, opening.Opened)}
    names = parameter_names(folder, sorted(weights))
    changes = adapter_changes(adapter, config, names.shapes)
    split, untied = untie(names, changes, keep=bool(config.get("ensure_weight_tying")))
    stored = {**names.stored, **{parameter: names.stored[twin] for parameter, twin in split.items()}}
    _check_modules(changes, stored, names, base, adapter, config, _method(folder))
    held: Mapping[str, Source]
    if trained is None:
        own = {parameter: weights[name] for parameter, name in stored.items()}
        held = _as_trained(adapter, names, weights | own) if (_method(folder) or "") not in BITSANDBYTES else {}
    else:
        held = {parameter: trained.weights[name] for parameter, name in stored.items() if name in trained.weights}
    parts = _parts(changes, names)
    changed = {*parts, *(stored[parameter] for parameter in changes if parameter in stored)}
    quantized = bool(opened) and not changed & opened  # then every code stays as it is
    if onto == "opened":
        weights |= {stored.get(name, name): source for name, source in held.items()}
    _check_onto(onto, base, adapter, folder, needed=bool(opened) and not quantized, opened=bool(held or opened))
    model = MergedModel(
        base=folder,
        adapter=adapter,
        config=config,
        dtype=dtype,
        tensors=_merged(dict(raw) if quantized else weights, changes, parts, names, split, stored, base, config, dtype),
        untied=untied,
        names=names,
        quantized=quantized,
        onto="opened" if onto == "opened" or (opened and not quantized) else "base",
        plain=weights | {parameter: weights[name] for parameter, name in stored.items()},
        trained=held if onto != "opened" else {},
    )
    return _with_vocabulary(model)


def _check_onto(onto: Onto, base: str, adapter: Path, folder: Path, *, needed: bool, opened: bool) -> None:
    """Raise unless there are weights to merge onto. needed: there are only opened ones. opened: there are such."""
    if needed and onto == "base":
        raise ModelError(
            f"{base} is stored quantized ({_method(folder)}): there are no other weights to merge onto; leave --onto "
            "out, or give --base_model_name_or_path the folder of the full-precision model that it was made from"
        )
    if onto == "opened" and _made_up(adapter):
        raise ModelError(
            f"--onto opened: {adapter} started by LoftQ and belongs to the weights before 4 bit; leave it out"
        )
    if onto == "opened" and not opened:
        raise ModelError(
            f"--onto opened: {adapter} was not trained in 4 or 8 bit, and {base} is not stored so; leave it out"
        )


def _check_modules(
    changes: dict[str, Change],
    stored: dict[str, str],
    names: Names,
    base: str,
    adapter: Path,
    config: dict[str, Any],
    method: str | None,
) -> None:
    """Raise unless the base has every parameter that the adapter changes."""
    unknown = [
        parameter
        for parameter, change in changes.items()
        if parameter not in stored and not _adds_to_parts(parameter, change, names)
    ]
    if not unknown:
        return
    if changes[unknown[0]].added is not None:
        raise ModelError(
            f"{adapter} has a bias in lora_B (lora_bias) of {changes[unknown[0]].module}, which has no bias in {base} "
            "that it could be added to; serve the adapter unmerged"
        )
    if method and unknown[0] not in names.fused:
        raise ModelError(
            f"{base} is stored quantized ({method}) in a way that byeori does not open; give "
            "--base_model_name_or_path the folder of the full-precision model that it was made from"
        )
    taken_apart = any(len(converter.target_patterns) > 1 for _, converter in names.fused.values())
    if unknown[0] in names.fused or (taken_apart and unknown[0] in names.shapes):
        raise ModelError(
            f"{base} stores {unknown[0]} together with other weights, and the adapter {adapter} changes it alone "
            f"({len(unknown)} modules): that cannot be merged into its files; serve the adapter unmerged"
        )
    raise ModelError(
        f"{base} has no {unknown[0]}, which the adapter {adapter} changes ({len(unknown)} modules left over); "
        f"use the base it was trained on ({config.get('base_model_name_or_path')}), or serve the adapter unmerged"
    )


def _parts(changes: dict[str, Change], names: Names) -> dict[str, Change]:
    """The changes of tensors of the files that transformers makes one parameter of: experts, or a fused layer."""
    parts: dict[str, Change] = {}
    for parameter, change in changes.items():
        if _adds_to_parts(parameter, change, names):
            keys = tuple(key for key, _ in names.fused[parameter][0])
            change = replace(change, transposed=parameter in names.transposed)
            if change.shape != names.shapes[parameter]:
                raise ModelError(
                    f"{parameter} is {list(names.shapes[parameter])} in the base and {list(change.shape)} in the "
                    "adapter; use the base it was trained on"
                )
            load = partial(expert_changes.whole_change, change)
            fused = expert_changes.Fused(parameter=parameter, keys=keys, load=load, model=names.model)
            parts |= dict.fromkeys(keys, Change(module=change.module, fused=fused))
    return parts


def _adds_to_parts(parameter: str, change: Change, names: Names) -> bool:
    """Whether a change is s B A alone, of a parameter made of several tensors that make no other one."""
    if parameter not in names.fused or change.a is None or change.b is None:
        return False
    others = change.whole or change.magnitude or change.token_rows or change.added
    return not others and len(names.fused[parameter][1].target_patterns) == 1


def _merged(
    weights: dict[str, Source],
    changes: dict[str, Change],
    parts: dict[str, Change],
    names: Names,
    split: dict[str, str],
    stored: dict[str, str],
    base: str,
    config: dict[str, Any],
    dtype: str,
) -> list[MergedTensor]:
    by_file = {file_name: parameter for parameter, file_name in names.stored.items()}
    merged = []
    for name, parameter in [*((name, by_file.get(name)) for name in weights), *((name, name) for name in split)]:
        source = weights[name if parameter is None else stored[parameter]]
        change = changes.get(parameter) if parameter else parts.get(name)
        if change and parameter in names.transposed:
            change = replace(change, transposed=True)
        same = dtype == "auto" or source.dtype not in BYTES
        kept = source.dtype if same else FLOATS[dtype]
        item = MergedTensor(name=name, parameter=parameter, source=source, dtype=kept, change=change)
        merged.append(item if change is None else _fitted(item, change, base, config))
    return merged


def _fitted(item: MergedTensor, change: Change, base: str, config: dict[str, Any]) -> MergedTensor:
    """Return the tensor with its change, and the adapter's whole tensor as its source if there is one.

    Embedding and head may have more rows than the base's: the vocabulary was extended before training. Whole ones may
    also have fewer: surplus rows were taken away.
    """
    if change.token_rows and (rows := max(change.tokens, default=0) + 1) > item.source.shape[0]:
        item = replace(item, source=opening.longer(item.source, rows))
    base_shape, shapes = item.source.shape, []
    if change.whole:
        resized = is_embedding(f"{change.module}.weight") and change.whole.dtype in BYTES
        base_shape = (change.whole.shape[0], *base_shape[1:]) if resized else base_shape
        shapes.append(change.whole.shape)
    if change.a and change.b:
        shapes.append(change.shape)
    if change.token_rows:
        fits = change.token_rows.shape[1:] == base_shape[1:] and max(change.tokens, default=0) < base_shape[0]
        shapes.append(base_shape if fits else change.token_rows.shape)
    if change.added:
        shapes.append(change.added.shape)
    for shape in shapes:
        if shape != base_shape:
            raise ModelError(
                f"{change.module} is {list(base_shape)} in {base} and {list(shape)} in the adapter; "
                f"use the base it was trained on ({config.get('base_model_name_or_path')})"
            )
    if item.dtype not in BYTES:
        raise ModelError(f"{item.name} of {base} is stored as {item.dtype}; use the base in full precision")
    return replace(item, source=change.whole or item.source, change=change)


def _with_vocabulary(model: MergedModel) -> MergedModel:
    """Return the merge with its number of tokens; the base's embedding has the rows that its adapter needs."""
    longer = [item for item in model.tensors if item.change and item.change.token_rows and not item.change.whole]
    plain = {name: item.source for item in longer for name in (item.name, item.parameter) if name}
    return replace(model, vocabulary=_vocabulary(model), plain=model.plain | plain)


def _vocabulary(model: MergedModel) -> int | None:
    """The number of tokens, if the adapter brings an embedding with more of them.

    Raises:
        ModelError: if embedding and head have not the same number.
    """
    items = [item for item in model.tensors if item.parameter in model.names.embeddings]
    resized = [item for item in items if item.source.shape[0] != model.plain[str(item.parameter)].shape[0]]
    if not resized:
        return None
    count = resized[0].source.shape[0]
    if odd := next((item for item in items if item.source.shape[0] != count), None):
        raise ModelError(
            f"{resized[0].name} has {count} tokens in the adapter and {odd.name} has {odd.source.shape[0]}: the "
            "vocabulary was extended for one of them only; save both with the adapter"
        )
    return count


def trained_over(adapter: Path, base: str | None) -> str | None:
    """Return the base of the training run, with its quantization."""
    bits = trained_bits(adapter)
    return f"{base}, held in {bits} bit" if bits else base


def trained_bits(adapter: Path) -> int | None:
    """Return 4 or 8 if the run held its frozen weights so."""
    settings = run_settings(adapter)
    return next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit") is True), None)


def _made_up(adapter: Path) -> bool:
    """Whether training made up for what 4 or 8 bit lose (LoftQ); what is saved belongs to the base's own weights."""
    return run_settings(adapter).get("lora_init") == "loftq"


def _as_trained(adapter: Path, names: Names, sources: dict[str, Source]) -> Mapping[str, Source]:
    """The weights that training held in 4 or 8 bit, by parameter; parts of one by their names in the files.

    sources: by either name.
    """
    bits = trained_bits(adapter)
    if bits is None or _made_up(adapter):
        return {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = resolve_dtype(str(run_settings(adapter).get("dtype", "auto")), device)
    held: dict[str, Source] = {}
    for name in sorted(names.quantizable):
        if name in names.fused:
            load = streamed_model.load_parameter(names.model, name, names, sources)
            again = partial(_quantized_again, load, name, bits, compute)
            keys = tuple(key for key, _ in names.fused[name][0])
            held |= expert_changes.Fused(parameter=name, keys=keys, load=again, model=names.model).opened(sources)
        elif name in sources:
            held[name] = opening.as_trained(sources[name], name, bits, compute)
    return held


def _quantized_again(load: streamed_model.Load, name: str, bits: int, compute: torch.dtype) -> torch.Tensor:
    return opening.quantized_again(load(), name, bits, compute)


def _method(folder: Path) -> str | None:
    config = json_file(folder / layout.CONFIG)
    method = (config.get("quantization_config") or {}).get("quant_method")
    return None if method is None else str(method)
