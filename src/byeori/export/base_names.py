"""The names of a base's parameters: in its files, in transformers' model, and what shares a weight with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byeori.errors import ModelError
from byeori.export.adapter_changes import Change
from byeori.model import experts
from byeori.model.load import explain, load_config
from byeori.model.quantize import plain_layers
from byeori.model.text_model import auto_class


@dataclass(frozen=True, kw_only=True)
class Names:
    """How transformers names the tensors of the base's files.

    stored: parameter -> tensor in the files. embeddings: the weights of embedding and head. fused: parameter made of
    several tensors -> (tensor, the pattern that it matches) of each, and what converts them. tied: parameter -> the one
    that it shares its weight with. transposed: weights of Conv1D layers, and of experts stored as these are.
    quantizable: weights that training in 4 or 8 bit quantizes. rename: tensor in the files -> parameter. shapes: of all
    parameters, in the model's order. model: itself, without weights.
    """

    stored: dict[str, str]
    embeddings: set[str]
    fused: dict[str, tuple[list[tuple[str, str]], Any]]
    tied: dict[str, str]
    transposed: set[str]
    quantizable: set[str]
    model_type: str
    rename: Callable[[str], str]
    shapes: dict[str, tuple[int, ...]]
    model: Any


def empty_model(folder: Path, *, buffers: bool = False, **changes: Any) -> Any:
    """Return the model of a folder's config.json on the meta device, as if its weights were not quantized.

    buffers: compute them, such as the frequencies of rotary embeddings. changes: of the text model's configuration.

    Raises:
        ModelError: if transformers does not know the model.
    """
    from accelerate import init_empty_weights

    config = load_config(str(folder))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            return auto_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers raises a different kind for each way in which a config can be wrong
        raise explain(error, str(folder), "architecture") from None


def parameter_names(folder: Path, keys: list[str]) -> Names:
    """Name the tensors of the files as transformers does when it loads them, on a model without weights.

    Raises:
        ModelError: if transformers does not know the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    from transformers.pytorch_utils import Conv1D

    model = empty_model(folder)
    parameters = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def rename(key: str) -> tuple[str, str | None]:
        prefix = model.base_model_prefix
        new, converted = rename_source_key(key, renamings, converters, prefix, parameters)
        if new not in parameters and key in parameters:
            return rename_source_key(key, [], [], prefix, parameters)
        return new, converted

    stored: dict[str, str] = {}
    fused: dict[str, tuple[list[tuple[str, str]], Any]] = {}
    for key in sorted(keys, key=dot_natural_key):  # the order in which transformers stacks experts
        new, pattern = rename(key)
        if pattern is None:
            stored[new] = key
        else:
            fused.setdefault(new, ([], by_pattern[pattern]))[0].append((key, pattern))
    modules = dict(model.named_modules())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return Names(
        stored=stored,
        embeddings={f"{name}.weight" for name, module in modules.items() if any(module is end for end in ends)},
        fused=fused,
        tied=dict(model.all_tied_weights_keys),
        transposed={f"{name}.weight" for name, module in modules.items() if isinstance(module, Conv1D)}
        | {
            f"{name}.{short}"
            for name, module in modules.items()
            if getattr(module, "is_transposed", False)
            for short, _ in module.named_parameters(recurse=False)
        },
        quantizable={
            f"{name}.weight"
            for _, _, layer in plain_layers(model)
            for name in [next(name for name, module in modules.items() if module is layer)]
        }
        | {f"{path}.{short}" for path, _, short, _ in experts.stacks(model)},
        model_type=model.config.get_text_config().model_type,
        rename=lambda key: rename(key)[0],
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        model=model,
    )


def untie(names: Names, changes: dict[str, Change], *, keep: bool) -> tuple[dict[str, str], bool]:
    """Return {parameter that gets its own tensor: the one whose weight it shared}, and whether any are untied.

    PEFT gives embedding and head separate adapters even if they share one weight, so that a change of one does not
    reach the other. With ensure_weight_tying (`keep`), for trainable tokens and for two copies of the same new
    embedding both have the same change, and `changes` is left with one.

    Raises:
        ModelError: if the shared weight has no name of its own in the base's files.
    """
    split: dict[str, str] = {}
    untied = False
    for parameter, twin in names.tied.items():
        present = [item for item in (parameter, twin) if item in names.stored]
        found = [changes[item] for item in (parameter, twin) if item in changes]
        if not present or not found:
            continue
        if keep or all(change.for_tied for change in found) or _are_copies(found):
            changes.pop(parameter, None), changes.pop(twin, None)
            changes.update(dict.fromkeys(present, found[0]))
            continue
        untied = True
        for missing in {parameter, twin} - set(present):
            if names.rename(missing) != missing or missing not in names.embeddings:  # transformers ties blocks always
                raise ModelError(
                    f"{missing} shares its weight and cannot be stored separately; serve the adapter unmerged"
                )
            split[missing] = present[0]
    return split, untied


def _are_copies(changes: list[Change]) -> bool:
    """Whether two changes only put the same bytes in place of a weight."""
    wholes = [change.whole for change in changes if change.whole is not None and change.a is None]
    if len(wholes) < 2 or wholes[0].shape != wholes[1].shape or wholes[0].dtype != wholes[1].dtype:
        return False
    one, other = wholes
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.start), second.seek(other.start)
        left = one.size
        while left > 0:
            step = min(left, 1 << 24)
            if first.read(step) != second.read(step):
                return False
            left -= step
    return True
