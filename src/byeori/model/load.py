"""Weights and tokenizers: from a folder or the Hub, safetensors only, with errors a person can act on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from byeori.batch.packing import MICRO_BATCH_TOKENS
from byeori.errors import ByeoriError, HubError, ModelError
from byeori.kernels import bf16_matmul, forest_attention, native
from byeori.kernels.lm_head import Head
from byeori.model import names
from byeori.support import collector, hub
from byeori.support.pickles import missing_weights
from byeori.support.suggestions import nearest_file

# Operations of a micro-batch on a GPU, at 4 for each weight and token: some 50 ms of the fastest there are.
_LEAST_WORK, _MOST_TOKENS = 2e13, 32_768

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>", "[EOS]", "<end_of_text>")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it and on CPUs with bf16 units, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if bf16_matmul.units() else torch.float32


def micro_batch_tokens(dtype: str, device: torch.device, weights: int | None = None) -> int:
    """Tokens of a micro-batch where the settings, of a dtype, name none. weights: how many numbers the model has.

    A layer costs the host about a millisecond, so a GPU gets as much work at once as keeps it busy meanwhile.
    """
    if device.type == "cuda" and weights:
        tokens = MICRO_BATCH_TOKENS["cuda"]
        while 4 * weights * tokens < _LEAST_WORK and tokens < _MOST_TOKENS:
            tokens *= 2
        return tokens
    tiled = device.type == "cpu" and native.tiles() == 2 and resolve_dtype(dtype, device) == torch.bfloat16
    return MICRO_BATCH_TOKENS["tiles" if tiled else device.type]


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """The tokenizer, and a sentence for every token that it lacked and what is used instead.

    Raises:
        ModelError, HubError: no tokenizer there.
    """
    from transformers import AutoTokenizer

    try:
        with collector.paused():
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=not hub.reachable(name)
            )
    except Exception as error:  # transformers raises a different kind for each way in which a folder can be wrong
        raise explain(error, name, "tokenizer") from None
    if isinstance(tokenizer.chat_template, dict):  # their names become file names where the tokenizer is saved
        for title in tokenizer.chat_template:
            if not re.fullmatch(r"[\w-][\w .-]*", title):
                raise ModelError(f"{name} names a chat template {title!r}, which is no name for a file; rename it")
    notes = []
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        found = next((token for token in _END_OF_TEXT if token in vocabulary), None)
        if found:
            tokenizer.eos_token = found
            notes.append(f"the tokenizer names no end-of-text token; {found!r} is used")
        else:
            notes.append("the tokenizer has no end-of-text token; answers are not ended, so add_eos_token is off")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        notes.append(f"the tokenizer has no padding token; {tokenizer.pad_token!r} is used (masked, never trained)")
    tokenizer.padding_side = "left"
    return tokenizer, notes


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        ModelError, HubError: no model there.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=not hub.reachable(name)
        )
    except Exception as error:
        raise explain(error, name, "config.json") from None


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal model in evaluation mode, on `device`, ready for forest attention.

    Raises:
        ModelError, HubError: no model there, or its files are damaged.
    """
    from transformers import AutoModelForCausalLM

    _quiet()
    try:
        if not Path(name).exists():
            hub.fetch(name, hub.WEIGHTS, revision=revision)
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=not hub.reachable(name),
            output_loading_info=True,
        )
    except Exception as error:
        raise explain(error, name, "weights") from None
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise ModelError(
            f"the weights of {name} lack {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + "; copy or download them again"
        )
    forest_attention.register()
    bf16_matmul.prepare(dtype, device)
    return model.to(device).eval()


def _quiet() -> None:
    """Keep transformers' bars and notes to itself, but not the bars of downloads, which it would silence with them."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as hf_logging

    shown = not are_progress_bars_disabled()
    hf_logging.disable_progress_bar()
    if shown:
        enable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def local_folder(name: str, revision: str | None = None, files: tuple[str, ...] = hub.MODEL) -> Path:
    """The folder that `name` is, or that files of the Hub's `name` are downloaded to: the small ones and safetensors.

    Raises:
        ModelError, HubError: neither a folder nor something that can be downloaded.
    """
    if Path(name).exists():
        return Path(name)
    try:
        return hub.fetch(name, files, revision=revision)
    except Exception as error:  # the Hub's client raises a different kind for each way in which this can go wrong
        raise explain(error, name, "weights") from None


def explain(error: Exception, name: str, what: str) -> ByeoriError:
    """One sentence for whatever went wrong while loading."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(link) for link in chain)
    if Path(name).exists():
        return _explain_local(error, Path(name), what, text)
    if hub.looks_local(name):
        return names.no_folder(name)
    if any(isinstance(link, GatedRepoError) for link in chain):
        return HubError(f"{name} is gated; accept its terms on the Hub and log in with `hf auth login`")
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return HubError(f"the Hub has no model {name}, or it is private; check the name or `hf auth login`")
    if any(isinstance(link, RevisionNotFoundError) for link in chain):
        return HubError(f"{name} has no such revision on the Hub; check --revision")
    reasons = ("connect", "offline", "resolve", "timed out", "network", "couldn't reach", "max retries")
    if any(word in text.lower() for word in reasons) or not hub.reachable(name):
        return HubError(
            f"{name} is neither a folder here{nearest_file(Path(name))} nor in the cache, and the Hugging Face Hub is "
            "out of reach; check the name, the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    if "trust_remote_code" in text:
        return ModelError(_remote_code(name))
    return ModelError(f"cannot load the {what} of {name}: {_first_sentence(error)}")


def _explain_local(error: Exception, folder: Path, what: str, text: str) -> ByeoriError:
    if not (folder / "config.json").exists():
        return names.not_a_model(folder)
    words = ("safetensor", "header", "incomplete metadata", "invalid json", "mmap", "buffer")
    if any(word in text.lower() for word in words) and what == "weights":
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            return ModelError(missing_weights(folder, "safetensors weights"))
        return ModelError(
            f"the weights in {folder} are damaged or cut short ({_first_sentence(error)}); copy or download them again"
        )
    if "trust_remote_code" in text:
        return ModelError(_remote_code(str(folder)))
    return ModelError(f"cannot load the {what} of {folder}: {_first_sentence(error)}")


def _remote_code(name: str) -> str:
    return f"{name} brings its own Python code, which is not run unless you read it and give --trust_remote_code {name}"


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def parts(model: Any) -> tuple[Any, Head]:
    """The stack of layers, and what turns its output into logits.

    model: a causal model of transformers, or a PeftModel around one.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config.get_text_config()
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    if config.model_type == "hyperclovax":  # multiplies by what Granite divides by
        divisor = 1 / divisor
    scale = float(getattr(config, "logit_scale", None) or 1.0) / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(module=causal.get_output_embeddings(), scale=scale, softcap=softcap)
    return causal.base_model, head


def positions_limit(config: Any) -> int | None:
    """The most positions that the model was made for, or None where it has no such limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
