"""LoRA adapters by PEFT: a new one on a base model, one from a folder, and an adapter's tensors.

PEFT imports bitsandbytes wherever it is installed, which brings PyTorch's compiler and takes a third of a command's
start-up. byeori quantizes weights itself (quantized_linear.py), so PEFT does without, unless the base was saved by
bitsandbytes and has its layers.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from byeori.errors import ConfigError, ModelError
from byeori.kernels import quantized_experts, trained_modules
from byeori.model import embedding_rows, experts, lora_start, text_model
from byeori.model.fingerprint import read_header
from byeori.support.suggestions import nearest

if TYPE_CHECKING:
    from peft import PeftModel

_NAME = "bitsandbytes"

GGUF_WITHOUT_HEAD = ("gemma", "gemma2")
"""Model types whose `lm_head.weight` llama.cpp's convert_hf_to_gguf leaves out, tied or not."""


class _ImportedOnUse:
    """bitsandbytes for peft.helpers, which imports it with PEFT though it rarely needs it."""

    def __getattr__(self, name: str) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes, name)


@contextmanager
def without_bitsandbytes(model: Any = None) -> Iterator[None]:
    """Hide bitsandbytes inside, unless it is imported already or `model` has layers of its own; PEFT finds it later."""
    modules = () if model is None else model.modules()
    if _NAME in sys.modules or any(type(module).__module__.startswith(_NAME) for module in modules):
        yield
        return
    sys.modules[_NAME] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    _forget_whether_it_is_there()
    try:
        yield
    finally:
        del sys.modules[_NAME]
        _forget_whether_it_is_there()
        helpers = sys.modules.get("peft.helpers")
        if getattr(helpers, "bnb", ...) is None and find_spec(_NAME) is not None:
            helpers.bnb = _ImportedOnUse()  # type: ignore[union-attr]


@contextmanager
def names_kept() -> Iterator[None]:
    """Have PEFT load adapters whose names are the model's own as they are, inside.

    It renames every adapter as transformers renames old checkpoints of that model, and some of those patterns match new
    names too: `model.layers.` is in `language_model.layers.`.
    """
    from peft.utils import transformers_weight_conversion as conversion

    renamed = conversion.convert_peft_adapter_state_dict_for_transformers

    def kept(model: Any, peft_config: Any, adapter_state_dict: dict[str, Any], adapter_name: str = "default") -> Any:
        own = {key for name in model.state_dict() for key in (name, re.sub(rf"\.{adapter_name}(?=\.|$)", "", name))}
        fit = all(name in own for name in adapter_state_dict if "lora_" in name)
        return adapter_state_dict if fit else renamed(model, peft_config, adapter_state_dict, adapter_name)

    conversion.convert_peft_adapter_state_dict_for_transformers = kept
    try:
        yield
    finally:
        conversion.convert_peft_adapter_state_dict_for_transformers = renamed


def _forget_whether_it_is_there() -> None:
    """Clear PEFT's cached answers to whether bitsandbytes is installed."""
    if known := sys.modules.get("peft.import_utils"):
        known.is_bnb_available.cache_clear()
        known.is_bnb_4bit_available.cache_clear()


def target_names(model: torch.nn.Module, wanted: list[str], *, by_layer: bool = False) -> list[str] | str:
    """Return the target modules for PEFT, checked against the model's layers. by_layer: as endings of names.

    Raises:
        ConfigError: if a name ends no layer's name; the message lists the names there are.
    """
    from transformers.pytorch_utils import Conv1D

    if wanted == ["all-linear"]:
        named, old = text_model.linear_targets(model), experts.old_names(model)
        # PEFT's own all-linear has the router and all experts of some models, as they were in transformers 4
        if named is None and (by_layer or old or experts.found(model)):
            named = _linear_endings(model)
        return [name for name in named if name.rpartition(".")[2] not in old] if named else "all-linear"
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    names = [
        name for name, module in model.named_modules() if isinstance(module, kinds) or hasattr(module, "quant_state")
    ]
    if len(wanted) == 1 and re.search(r"[^\w.-]", wanted[0]) and _matches_any(wanted[0], names):
        return wanted[0]  # PEFT takes a string for a regular expression of whole names
    known = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for name in wanted:
        if not any(full == name or full.endswith("." + name) for full in names):
            raise ConfigError(
                f"--lora_target_modules: no layer is called {name!r}{nearest(name, known)}; "
                f"the layers are {', '.join(known)}"
            )
    if taken := sorted({name.rpartition(".")[2] for name in wanted} & experts.old_names(model)):
        raise ConfigError(
            f"--lora_target_modules: PEFT takes {', '.join(taken)} of this model for its experts, which had these "
            "names in transformers 4; leave them out, and adapt experts by --lora_target_parameters"
        )
    return wanted


def _linear_endings(model: Any) -> list[str]:
    """What all-linear is to PEFT, as endings of names: it wants these with layers_to_transform."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    return sorted({text_model.ending(name) for name in linear if model.get_submodule(name) is not head})


def _matches_any(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What makes an adapter other than plain LoRA, under the names of PEFT's LoraConfig.

    init: its init_lora_weights, `default` for True. rank_pattern, alpha_pattern: (ending of names, value).
    layers_to_transform: () is all. tokens: whose rows of embedding and head are trained; new ones too.
    """

    init: str = "default"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def rows(self) -> int | None:
        """The rows that the embedding needs at least, or None."""
        return max(self.tokens) + 1 if self.tokens else None

    @property
    def differs_by_layer(self) -> bool:
        """Whether layers of the same kind may have other adapters: a pattern can name a layer by its number."""
        patterns = [name for name, _ in (*self.rank_pattern, *self.alpha_pattern)]
        names = (*patterns, *self.modules_to_save, *self.target_parameters)
        return bool(self.layers_to_transform) or any(map(may_name_layers, names))


PLAIN = Variant()


def may_name_layers(name: str) -> bool:
    """Return whether an ending of names, or a regular expression, may stand for some layers of a kind only."""
    return re.search(r"(^|\.)\d|[^\w.-]", name) is not None


def attach(
    model: torch.nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    seed: int,
    revision: str | None = None,
    variant: Variant = PLAIN,
) -> PeftModel:
    """Put a new LoRA adapter on the model; its parameters are float32, everything else is frozen.

    revision: of the base on the Hub; the adapter's configuration records it. An adapter whose start depends on the
    base's weights gets it from `lora_start.begin`.

    Raises:
        ConfigError: if a target does not exist. ModelError: if PEFT refuses one.
    """
    if not text_model.writes_text(model):
        raise ModelError(text_model.not_for_text(model))
    torch.manual_seed(seed)  # A is random; B starts at zero
    with without_bitsandbytes(model):
        from peft import LoraConfig, get_peft_model
        from transformers.initialization import no_init_weights

        config = LoraConfig(
            r=r,
            lora_alpha=lora_start.whole_number(alpha),
            lora_dropout=dropout,
            target_modules=target_names(model, targets, by_layer=bool(variant.layers_to_transform)),
            exclude_modules=text_model.excluded(model),
            task_type="CAUSAL_LM",
            revision=revision,
            init_lora_weights=variant.init if variant.init in ("gaussian", "orthogonal") else True,
            use_rslora=variant.use_rslora,
            use_dora=variant.use_dora,
            lora_bias=variant.lora_bias,
            rank_pattern=dict(variant.rank_pattern),
            alpha_pattern={name: lora_start.whole_number(value) for name, value in variant.alpha_pattern},
            layers_to_transform=list(variant.layers_to_transform) or None,
            modules_to_save=_modules(model, variant.modules_to_save),
            target_parameters=experts.parameters(model, variant.target_parameters),
            trainable_token_indices={name: list(variant.tokens) for name in _embeddings(model)} or None
            if variant.tokens
            else None,
        )
        on_meta = next(model.parameters()).is_meta  # then there are no first values to draw
        try:
            with no_init_weights() if on_meta else nullcontext(), lora_start.readable(model, variant.use_dora):
                tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError) as error:
            raise ModelError(f"PEFT cannot put an adapter on {', '.join(targets)}: {error}") from None
    _check_patterns(tuned, variant)
    trained_modules.prepare(tuned)
    quantized_experts.let_peft_add(tuned)
    return tuned


def _embeddings(model: Any) -> list[str]:
    """The names of the embedding and, if it has a weight of its own, of the head."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = wanted[1] is None or wanted[0].weight is wanted[1].weight
    return [name for name, module in model.named_modules() if any(module is each for each in wanted[: 2 - tied])]


def _modules(model: torch.nn.Module, wanted: tuple[str, ...]) -> list[str] | None:
    """Check the names of modules that are trained whole.

    Raises:
        ConfigError: if there is none of a name, or its weights are quantized.
    """
    named = dict(model.named_modules())
    for name in wanted:
        found = [module for full, module in named.items() if full == name or full.endswith(f".{name}")]
        known = list(dict.fromkeys(full.rsplit(".", 1)[-1] for full in named if full))
        if not found:
            raise ConfigError(f"--modules_to_save: no module is called {name!r}{nearest(name, known)}")
        if any(not each.is_floating_point() for module in found for each in module.parameters()):
            raise ConfigError(f"--modules_to_save: {name} has quantized weights, which cannot be trained; leave it out")
    return list(wanted) or None


def _check_patterns(model: PeftModel, variant: Variant) -> None:
    """Raise unless every pattern and layer number concerns an adapted layer.

    Raises:
        ConfigError: if one has no effect.
    """
    from peft.utils.other import get_pattern_key

    names = list(lora_start.adapted_layers(model))
    for flag, patterns in (("rank_pattern", variant.rank_pattern), ("alpha_pattern", variant.alpha_pattern)):
        for key, _ in patterns:
            if all(get_pattern_key([key], name) == name != key for name in names):
                endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
                raise ConfigError(
                    f"--{flag}: no adapted layer is called {key!r}{nearest(key, endings)}; they end in "
                    f"{', '.join(endings)}"
                )
    for number in variant.layers_to_transform:
        if not any(f".{number}." in name for name in names):
            raise ConfigError(f"--layers_to_transform: layer {number} has none of the layers to adapt")


def tied_targets(model: PeftModel) -> list[str]:
    """Return the names of adapted layers whose weight another layer shares: a head tied to its embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and owners[id(getattr(module.get_base_layer(), "weight", None))] > 1
    ]


def untied_note(model_type: str) -> str:
    """Return what becomes of a model whose head or embedding is adapted though both share one weight."""
    note = (
        "embedding and head share one weight, and the adapter changes only one of them or each in its own way: the "
        "merged model has both (tie_word_embeddings is off)"
    )
    if model_type in GGUF_WITHOUT_HEAD:
        note += f"; llama.cpp's GGUF converter drops the head of {model_type} models, so serve it with another server"
    return note


def load_adapter(
    model: torch.nn.Module, folder: Path, *, trainable: bool = False
) -> tuple[PeftModel, list[str], list[str]]:
    """Put the adapter of a folder on the model.

    Returns it, the names of the adapter's weights that the file lacks, and the names in the file that have no layer.
    Raises whatever PEFT raises, a different kind for each way in which an adapter can be wrong.
    """
    with without_bitsandbytes(model), names_kept():
        from peft import PeftConfig, PeftModel

        config: Any = PeftConfig.from_pretrained(str(folder))
        with lora_start.readable(model, getattr(config, "use_dora", False)):
            tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    quantized_experts.let_peft_add(tuned)
    if trainable:
        trained_modules.prepare(tuned)
        whole = any(embedding_rows.is_embedding(name) for name in read_header(folder / "adapter_model.safetensors"))
        tuned.byeori_whole_embedding = whole and not config.modules_to_save
    # from_pretrained only warns of names that do not fit; loading once more returns them
    with names_kept():
        keys = tuned.load_adapter(str(folder), "default", is_trainable=trainable)
    return tuned, [key for key in keys.missing_keys if "lora_" in key], keys.unexpected_keys


def combine(model: torch.nn.Module, folders: Sequence[Path], kind: str, output: Path) -> None:
    """Write the combination of LoRA adapters as an adapter, with PEFT's add_weighted_adapter.

    kind: stack adds their updates, with as many ranks as they have together (cat); average averages their matrices,
    with square roots of the weights for A and B, so that it has products of different adapters as well (linear).
    Raises whatever PEFT raises, of kinds that differ.
    """
    with without_bitsandbytes(model):
        from peft import PeftModel

        names = [f"run_{number}" for number in range(len(folders))]  # a bare number is a layer's name too
        tuned = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            tuned.load_adapter(str(folder), name)
        for config in tuned.peft_config.values():
            config.use_rslora = False  # its factor is in the scaling already, and PEFT would apply it once more
        weight, how = (1.0, "cat") if kind == "stack" else (1 / len(names), "linear")
        tuned.add_weighted_adapter(names, [weight] * len(names), "combined", combination_type=how)
        tuned.save_pretrained(str(output), selected_adapters=["combined"])
    for path in sorted((output / "combined").iterdir()):
        path.replace(output / path.name)
    (output / "combined").rmdir()


def state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that they have in its file."""
    from peft import get_peft_model_state_dict

    with_embedding = bool(getattr(model, "byeori_whole_embedding", False))  # an adapter whose vocabulary was extended
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=lora_start.joined(model.state_dict()), save_embedding_layers=with_embedding
    )
    return tensors


def load_state(model: PeftModel, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Load an adapter's tensors by the names of its file; return the missing and the unexpected names.

    Raises:
        RuntimeError, ValueError: if a shape does not fit.
    """
    from peft import set_peft_model_state_dict

    with names_kept():
        keys = set_peft_model_state_dict(model, lora_start.split(model, tensors))
    return keys.missing_keys, keys.unexpected_keys
