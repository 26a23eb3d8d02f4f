"""Plan a merge from names and shapes alone: what the adapter does to every tensor of the base.

    adapter's tensors ──> changes by parameter ─┐
    base's tensors, named as transformers does ─┴─> MergedModel, one MergedTensor for each tensor to write

Whatever cannot be merged exactly is rejected here, before a byte is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import layout, records
from byeori.artifacts.saved_model import run_settings
from byeori.errors import ModelError
from byeori.model.fingerprint import Stored, read_header, stored_tensors
from byeori.model.load import explain, load_config
from byeori.support.foreign_files import json_file
from byeori.support.pickles import missing_weights

Progress = Callable[[int, int], None]
"""Called with (tensors done, total)."""

FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's name of a dtype -> safetensors' name."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FULL_PRECISION = {*_BYTES, "I64", "BOOL"}

# Settings of adapters that are more than W + scale * B A, and their names.
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "adapters on bare parameters",
}
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of one parameter: it is replaced by `whole`, if given, then scale * L R is added.

    L = B [out, r] and R = A [r, in] for a linear layer; L = A^T and R = B^T if the weight is stored transposed
    (`transposed`: GPT-2's Conv1D [in, out], an embedding [words, hidden]).
    """

    module: str
    whole: Stored | None = None
    a: Stored | None = None
    b: Stored | None = None
    transposed: bool = False
    scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """One tensor of the merged model. source: where its bytes come from. dtype: safetensors' name."""

    name: str
    source: Stored
    dtype: str
    change: Change | None

    @property
    def size(self) -> int:
        """Bytes in the merged files."""
        return self.source.size if self.dtype == self.source.dtype else self.source.count * _BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A planned merge: all that a format needs to write the merged model.

    base, adapter: their folders. dtype: as asked for, `auto` or torch's name. untied: whether embedding and head were
    one tensor in the base and are two in the merged model.
    """

    base: Path
    adapter: Path
    dtype: str
    tensors: list[MergedTensor]
    untied: bool

    @property
    def total_bytes(self) -> int:
        return sum(item.size for item in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(item.source.count for item in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Names:
    """How transformers names the tensors of the base's files.

    stored: parameter -> tensor in the files. fused: parameters made of several tensors. tied: parameter -> the one
    that it shares its weight with. transposed: weights of Conv1D layers. rename: tensor in the files -> parameter.
    """

    stored: dict[str, str]
    fused: set[str]
    tied: dict[str, str]
    transposed: set[str]
    rename: Callable[[str], str]


def plan(*, folder: Path, base: str, adapter: Path, config: dict[str, Any], dtype: str) -> MergedModel:
    """Plan the merge of an adapter. folder: the base's; base: its name as given; config: the adapter's.

    Raises:
        ModelError: if adapter and base do not belong together, or one is damaged or of a kind that cannot be merged.
    """
    tensors = stored_tensors(folder)
    _check_full_precision(folder, base, tensors)
    changes = adapter_changes(adapter, config)
    names = parameter_names(folder, sorted(tensors))
    split, untied = untie(names, changes, keep=bool(config.get("ensure_weight_tying")))
    stored = {**names.stored, **{parameter: names.stored[twin] for parameter, twin in split.items()}}
    unknown = [parameter for parameter in changes if parameter not in stored]
    if unknown:
        why = " as a tensor of its own (it is fused when loaded)" if unknown[0] in names.fused else ""
        raise ModelError(
            f"{base} has no {unknown[0]}{why}, which the adapter {adapter} changes ({len(unknown)} modules left over); "
            f"use the base it was trained on ({config.get('base_model_name_or_path')}), or serve the adapter unmerged"
        )
    by_file = {file_name: parameter for parameter, file_name in names.stored.items()}
    merged = []
    for name, parameter in [*((name, by_file.get(name)) for name in tensors), *((name, name) for name in split)]:
        source = tensors[name if parameter is None else stored[parameter]]
        change = changes.get(parameter) if parameter else None
        if change and parameter in names.transposed:
            change = replace(change, transposed=True)
        same = dtype == "auto" or source.dtype not in _BYTES
        item = MergedTensor(name=name, source=source, dtype=source.dtype if same else FLOATS[dtype], change=change)
        merged.append(item if change is None else _fitted(item, change, base, config))
    return MergedModel(base=folder, adapter=adapter, dtype=dtype, tensors=merged, untied=untied)


def adapter_config(adapter: Path) -> dict[str, Any]:
    """Return the adapter's adapter_config.json.

    Raises:
        ModelError: if it is not an adapter, or one of a kind that cannot be merged.
    """
    path = adapter / layout.ADAPTER_CONFIG
    if not adapter.is_dir():
        raise ModelError(f"there is no adapter folder {adapter}; use the folder that training wrote")
    if not path.is_file():
        raise ModelError(
            f"{adapter} is not an adapter: it has no adapter_config.json; use the folder that training wrote"
        )
    config = records.adapter_config(adapter)
    kind = config["peft_type"]
    if kind != "LORA":
        raise ModelError(f"{adapter} is an adapter of type {kind}; only LORA can be merged, serve it unmerged")
    for setting, kind_name in _OTHER_KINDS.items():
        if config.get(setting):
            raise ModelError(f"{adapter} uses {kind_name} ({setting}), which cannot be merged; serve it unmerged")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise ModelError(
            f"{adapter} was initialised with {init}, which changed its base; convert it to plain LoRA with PEFT first"
        )
    return config


def trained_over(adapter: Path, base: str | None) -> str | None:
    """Return the base of the training run, with its quantization; the merge itself is into the unquantized weights."""
    settings = run_settings(adapter)
    bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), None)
    return f"{base}, held in {bits} bit" if bits else base


def adapter_changes(adapter: Path, config: dict[str, Any]) -> dict[str, Change]:
    """Return parameter -> change from the names of the adapter's tensors (Conv1D layers are not known here).

    Raises:
        ModelError: if there are no safetensors weights, or if they are damaged or more than plain LoRA.
    """
    path = adapter / layout.ADAPTER
    if not path.is_file():
        raise ModelError(f"the adapter is incomplete: {missing_weights(adapter, layout.ADAPTER)}")
    changes: dict[str, Change] = {}
    for key, stored in read_header(path).items():
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        parameter = f"{module}.weight" if part else module.replace(".base_layer.", ".")
        change = changes.get(parameter) or Change(module=parameter.rpartition(".")[0])
        if stored.dtype not in _BYTES:
            raise ModelError(f"{path}: {key} is stored as {stored.dtype}; save the adapter in float32 or bfloat16")
        if not part:
            changes[parameter] = replace(change, whole=stored)
        elif part in ("A.weight", "embedding_A"):
            changes[parameter] = replace(change, a=stored, transposed=part == "embedding_A")
        elif part in ("B.weight", "embedding_B"):
            changes[parameter] = replace(change, b=stored)
        else:
            raise ModelError(f"{path} holds {key}, which plain LoRA does not have; serve the adapter unmerged")
    if not changes:
        raise ModelError(f"{path} is empty; train the adapter, or copy it again")
    return {name: _scaled(change, config, path) for name, change in changes.items()}


def _scaled(change: Change, config: dict[str, Any], path: Path) -> Change:
    """Return the change with its scale, after checking that A and B have the rank that the config names."""
    from peft.utils.other import get_pattern_key

    if change.a is None and change.b is None:
        return change
    if change.a is None or change.b is None:
        raise ModelError(f"{path} has only half of the adapter of {change.module}; copy the adapter again")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), change.module), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), change.module), config["lora_alpha"])
    a, b = change.a.shape, change.b.shape
    if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank):
        raise ModelError(
            f"{path}: A {list(a)} and B {list(b)} of {change.module} are not of rank {rank}, as adapter_config.json "
            "says; copy the adapter again"
        )
    return replace(change, scale=alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _fitted(item: MergedTensor, change: Change, base: str, config: dict[str, Any]) -> MergedTensor:
    """Return the tensor with its change, and the adapter's whole tensor as its source if there is one."""
    shapes = [change.whole.shape] if change.whole else []
    if change.a and change.b:
        pair = (change.b.shape[0], change.a.shape[1])
        shapes.append(pair[::-1] if change.transposed else pair)
    for shape in shapes:
        if shape != item.source.shape:
            raise ModelError(
                f"{change.module} is {list(item.source.shape)} in {base} and {list(shape)} in the adapter; "
                f"use the base it was trained on ({config.get('base_model_name_or_path')})"
            )
    if item.dtype not in _BYTES:
        raise ModelError(f"{item.name} of {base} is stored as {item.dtype}; use the base in full precision")
    return replace(item, source=change.whole or item.source, change=change)


def untie(names: Names, changes: dict[str, Change], *, keep: bool) -> tuple[dict[str, str], bool]:
    """Return {parameter that gets its own tensor: the one whose weight it shared}, and whether any are untied.

    PEFT gives embedding and head separate adapters even if they share one weight, so that a change of one does not
    reach the other. With ensure_weight_tying (`keep`) both have the same change, and `changes` is left with one.

    Raises:
        ModelError: if the shared weight has no name of its own in the base's files.
    """
    split: dict[str, str] = {}
    untied = False
    for parameter, twin in names.tied.items():
        present = [item for item in (parameter, twin) if item in names.stored]
        if not present or not (parameter in changes or twin in changes):
            continue
        if keep:
            second, first = changes.pop(parameter, None), changes.pop(twin, None)
            changes.update({item: change for item in present if (change := first or second)})
            continue
        untied = True
        for missing in {parameter, twin} - set(present):
            if names.rename(missing) != missing:
                raise ModelError(
                    f"{missing} shares its weight and cannot be stored separately; serve the adapter unmerged"
                )
            split[missing] = present[0]
    return split, untied


def parameter_names(folder: Path, keys: list[str]) -> Names:
    """Name the tensors of the files as transformers does when it loads them, on a model without weights.

    Raises:
        ModelError: if transformers does not know the model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D

    config = load_config(str(folder))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises a different kind for each way in which a config can be wrong
        raise explain(error, str(folder), "architecture") from None
    parameters = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]

    def rename(key: str) -> tuple[str, str | None]:
        prefix = model.base_model_prefix
        new, converted = rename_source_key(key, renamings, converters, prefix, parameters)
        if new not in parameters and key in parameters:
            return rename_source_key(key, [], [], prefix, parameters)
        return new, converted

    renamed = {key: rename(key) for key in keys}
    return Names(
        stored={new: key for key, (new, converted) in renamed.items() if converted is None},
        fused={new for new, converted in renamed.values() if converted is not None},
        tied=dict(model.all_tied_weights_keys),
        transposed={f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)},
        rename=lambda key: rename(key)[0],
    )


def _check_full_precision(folder: Path, base: str, tensors: dict[str, Stored]) -> None:
    """Raise unless the base is stored unquantized: a change cannot be added to 4- or 8-bit codes."""
    config = json_file(folder / layout.CONFIG)
    method = (config.get("quantization_config") or {}).get("quant_method")
    codes = sorted({item.dtype for item in tensors.values()} - _FULL_PRECISION)
    if method and codes:
        raise ModelError(
            f"{base} is stored quantised ({method}, {', '.join(codes)}); use --base_model_name_or_path with the folder "
            "of the full-precision model it was made from"
        )
