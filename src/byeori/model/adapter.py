"""LoRA adapters by PEFT: a new one on a base model, one from a folder, and an adapter's tensors.

PEFT imports bitsandbytes wherever it is installed, which brings PyTorch's compiler and takes a third of a command's
start-up. byeori quantizes weights itself (quantized_linear.py), so PEFT does without, unless the base was saved by
bitsandbytes and has its layers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from byeori.errors import ConfigError, ModelError
from byeori.model import text_model
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


def _forget_whether_it_is_there() -> None:
    """Clear PEFT's cached answers to whether bitsandbytes is installed."""
    if known := sys.modules.get("peft.import_utils"):
        known.is_bnb_available.cache_clear()
        known.is_bnb_4bit_available.cache_clear()


def target_names(model: torch.nn.Module, wanted: list[str]) -> list[str] | str:
    """Return the target modules for PEFT, checked against the model's layers.

    Raises:
        ConfigError: if a name ends no layer's name; the message lists the names there are.
    """
    if wanted == ["all-linear"]:
        return text_model.linear_targets(model) or "all-linear"
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    names = [
        name for name, module in model.named_modules() if isinstance(module, kinds) or hasattr(module, "quant_state")
    ]
    known = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for name in wanted:
        if not any(full == name or full.endswith("." + name) for full in names):
            raise ConfigError(
                f"--lora_target_modules: no layer is called {name!r}{nearest(name, known)}; "
                f"the layers are {', '.join(known)}"
            )
    return wanted


def attach(
    model: torch.nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    seed: int,
    revision: str | None = None,
) -> PeftModel:
    """Put a new LoRA adapter on the model; its parameters are float32, everything else is frozen.

    revision: of the base on the Hub; the adapter's configuration records it.

    Raises:
        ConfigError: if a target does not exist. ModelError: if PEFT refuses one.
    """
    torch.manual_seed(seed)  # A is random; B starts at zero
    with without_bitsandbytes(model):
        from peft import LoraConfig, get_peft_model
        from transformers.initialization import no_init_weights

        config = LoraConfig(
            r=r,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
            lora_dropout=dropout,
            target_modules=target_names(model, targets),
            exclude_modules=text_model.excluded(model),
            task_type="CAUSAL_LM",
            revision=revision,
        )
        on_meta = next(model.parameters()).is_meta  # then there are no first values to draw
        try:
            with no_init_weights() if on_meta else nullcontext():
                return get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError) as error:
            raise ModelError(f"PEFT cannot put an adapter on {', '.join(targets)}: {error}") from None


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
    with without_bitsandbytes(model):
        from peft import PeftModel

        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    # from_pretrained only warns of names that do not fit; loading once more returns them
    keys = tuned.load_adapter(str(folder), "default", is_trainable=trainable)
    return tuned, [key for key in keys.missing_keys if "lora_" in key], keys.unexpected_keys


def state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that they have in its file."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def load_state(model: PeftModel, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Load an adapter's tensors by the names of its file; return the missing and the unexpected names.

    Raises:
        RuntimeError, ValueError: if a shape does not fit.
    """
    from peft import set_peft_model_state_dict

    keys = set_peft_model_state_dict(model, tensors)
    return keys.missing_keys, keys.unexpected_keys
