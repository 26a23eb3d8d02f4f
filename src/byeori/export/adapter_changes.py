"""What an adapter of PEFT's does to the parameters of its base, from its configuration and the names of its tensors.

    adapter_config.json ── kinds that can be merged ──┐
    names of the adapter's tensors ───────────────────┴──> parameter -> Change

The rules are those of PEFT's own merge_and_unload.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, records
from byeori.errors import ModelError
from byeori.export import expert_changes
from byeori.export.expert_changes import Fused
from byeori.model.fingerprint import Stored, read_header
from byeori.model.opened import FLOATS
from byeori.support.pickles import missing_weights

# Settings of adapters that are more than a change of weights, or of other weights than those named, and their names.
_OTHER_KINDS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "replicated layers",
}
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings whose effect is computed here, or that have none on what the trained tensors do.
_KNOWN = {
    *(
        "peft_type",
        "task_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
    *("bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "qalora_group_size", "target_parameters", *_OTHER_KINDS),
}
_RANK = _ALPHA = 8  # PEFT's own defaults


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of one parameter W, in this order.

    whole: replaces it. a, b: scale * L R is added, where L = B [out, r] and R = A [r, in] for a linear layer; L = A^T
    and R = B^T if the weight is stored transposed (`transposed`: GPT-2's Conv1D [in, out], an embedding [words,
    hidden]). magnitude (DoRA): then every output's weights get this length. added: scale * added is added to a bias.
    tokens, token_rows: rows of an embedding, and their values. experts: W is [experts, ., .], with L R for each.
    fused: W is one tensor of several that transformers makes a parameter of, whose change this is.
    """

    module: str
    whole: Stored | None = None
    a: Stored | None = None
    b: Stored | None = None
    magnitude: Stored | None = None
    added: Stored | None = None
    tokens: tuple[int, ...] = ()
    token_rows: Stored | None = None
    transposed: bool = False
    scale: float = 0.0
    experts: int = 0
    fused: Fused | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what A and B add."""
        assert self.a is not None and self.b is not None
        pair = (self.b.shape[0], self.a.shape[1])
        pair = pair[::-1] if self.transposed else pair
        return (self.experts, *pair) if self.experts else pair

    @property
    def for_tied(self) -> bool:
        """Whether a weight that shares this one changes with it: PEFT ties trainable tokens."""
        return self.token_rows is not None and self.a is None and self.whole is None


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
    if unknown := sorted(name for name, value in config.items() if name not in _KNOWN and value):
        raise ModelError(
            f"{path} has the setting {unknown[0]}, which byeori does not know and which could change the result; merge "
            "it with the PEFT that wrote it, or serve it unmerged"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise ModelError(
            f"{adapter} was initialised with {init}, which changed its base; convert it to plain LoRA with PEFT first"
        )
    return config


def adapter_tensors(adapter: Path) -> dict[str, Stored]:
    """Return the adapter's tensors by the names that PEFT gives them.

    Other trainers save the adapter's name within them (`lora_A.default.weight`), and PEFT 0.17 and later save modules
    with a new vocabulary three times.

    Raises:
        ModelError: if there are no safetensors weights, or they are damaged or not numbers.
    """
    path = adapter / layout.ADAPTER
    if not path.is_file():
        raise ModelError(f"the adapter is incomplete: {missing_weights(adapter, layout.ADAPTER)}")
    tensors: dict[str, Stored] = {}
    for key, stored in read_header(path).items():
        if ".original_module." in key:
            continue
        if stored.dtype not in FLOATS.values():
            raise ModelError(f"{path}: {key} is stored as {stored.dtype}; save the adapter in float32 or bfloat16")
        name = re.sub(r"(\.(?:lora_\w+|token_adapter\.trainable_tokens_delta|modules_to_save))\.default\b", r"\1", key)
        tensors.setdefault(name.replace(".modules_to_save.", "."), stored)
    if not tensors:
        raise ModelError(f"{path} is empty; train the adapter, or copy it again")
    return tensors


def adapter_changes(adapter: Path, config: dict[str, Any], shapes: expert_changes.Shapes) -> dict[str, Change]:
    """Return parameter -> change (Conv1D layers are not known here). shapes: of the base's parameters.

    Raises:
        ModelError: if there are no safetensors weights, or if they are damaged or of a kind that is not known.
    """
    path = adapter / layout.ADAPTER
    changes: dict[str, Change] = {}
    wrappers = expert_changes.wrappers(config, shapes)
    for key, stored in adapter_tensors(adapter).items():
        name = key.removeprefix("base_model.model.")
        module, _, part = name.partition(".lora_")
        parameter = (
            wrappers.get(module, f"{module}.weight")
            if part
            else name.replace(".base_layer.", ".").replace(".token_adapter.", ".")
        )
        if part == "B.bias":
            parameter = f"{module}.bias"
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            parameter, part = f"{module}.weight", "tokens"
        stacked = shapes[parameter][0] if parameter in wrappers.values() and len(shapes[parameter]) == 3 else 0
        change = changes.get(parameter) or Change(module=parameter.rpartition(".")[0], experts=stacked)
        if not part:
            changes[parameter] = replace(change, whole=stored)
        elif part in ("A.weight", "embedding_A"):
            changes[parameter] = replace(change, a=stored, transposed=part == "embedding_A")
        elif part in ("B.weight", "embedding_B"):
            changes[parameter] = replace(change, b=stored)
        elif part in ("magnitude_vector", "magnitude_vector.weight"):
            changes[parameter] = replace(change, magnitude=stored)
        elif part == "B.bias":
            changes[parameter] = replace(change, added=stored)
        elif part == "tokens":
            changes[parameter] = replace(change, token_rows=stored, tokens=_tokens(config, module, stored, path))
        else:
            raise ModelError(f"{path} holds {key}, which plain LoRA does not have; serve the adapter unmerged")
    bare = set(wrappers.values())
    return {
        name: _scaled(change, config, path, name if name in bare else change.module) for name, change in changes.items()
    }


def _tokens(config: dict[str, Any], module: str, stored: Stored, path: Path) -> tuple[int, ...]:
    """The rows of a module that its trainable tokens are."""
    given = config.get("trainable_token_indices") or []
    if isinstance(given, dict):
        given = next((given[name] for name in given if f".{module}".endswith(f".{name}")), [])
    if len(given) != stored.shape[0]:
        raise ModelError(
            f"{path} has {stored.shape[0]} trainable tokens of {module} and adapter_config.json names {len(given)}; "
            "copy the adapter again"
        )
    return tuple(int(token) for token in given)


def _scaled(change: Change, config: dict[str, Any], path: Path, name: str) -> Change:
    """Return the change with its scale, after checking that A and B have the rank that the config gives its name."""
    from peft.utils.other import get_pattern_key

    if change.a is None and change.b is None and change.added is None:
        if change.magnitude is not None:
            raise ModelError(f"{path} has only half of the adapter of {change.module}; copy the adapter again")
        return change
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.get("r", _RANK))
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", _ALPHA))
    change = replace(change, scale=alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if change.added is not None:
        return change
    if change.a is None or change.b is None or bool(config.get("use_dora")) != (change.magnitude is not None):
        raise ModelError(f"{path} has only half of the adapter of {change.module}; copy the adapter again")
    a, b, rows = change.a.shape, change.b.shape, rank * (change.experts or 1)
    if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rows, rows):
        raise ModelError(
            f"{path}: A {list(a)} and B {list(b)} of {change.module} are not of rank {rank}, as adapter_config.json "
            "says; copy the adapter again"
        )
    return change
