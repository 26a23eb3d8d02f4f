"""Models, tokenizers and configs from a folder or the Hub, safetensors only, with errors that say what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from byeori.batch.packing import MICRO_BATCH_TOKENS
from byeori.errors import ByeoriError, HubError, ModelError
from byeori.kernels import bf16_matmul, forest_attention, native
from byeori.kernels.lm_head import Head
from byeori.model import load_opened, names, text_model
from byeori.support import collector, hub, hub_errors
from byeori.support.console import visible_output
from byeori.support.pickles import missing_weights
from byeori.support.suggestions import nearest_file

# FLOP of a micro-batch on a GPU, at 4 per weight and token: about 50 ms on the fastest GPUs.
_LEAST_WORK, _MOST_TOKENS = 2e13, 32_768

# sizes of a config.json by their names, and ten times what the largest models have
_MOST = {
    r"(num|n)_(\w+_)?layers?|(encoder|decoder)_layers": 2000,
    r"(num|n)_\w*heads?|num_(local_|routed_)?experts|n_routed_experts": 20_000,
    r"(\w+_)?(hidden|intermediate|ffn)_(size|dim)|n_embd|d_model|head_dim": 1 << 22,
    r"vocab_size": 1 << 26,
    r"\w*(dropout|pdrop)": 1,
}
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>", "[EOS]", "<end_of_text>")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of a --dtype; auto is bfloat16 if the device has it, else float16 on a GPU, float32 on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if bf16_matmul.units() else torch.float32


def micro_batch_tokens(dtype: str, device: torch.device, weights: int | None = None) -> int:
    """Return the default number of tokens in a micro-batch. dtype: of the settings. weights: of the whole model.

    A layer costs the host about a millisecond, so a GPU gets enough work at once to stay busy meanwhile.
    """
    if device.type == "cuda" and weights:
        tokens = MICRO_BATCH_TOKENS["cuda"]
        while 4 * weights * tokens < _LEAST_WORK and tokens < _MOST_TOKENS:
            tokens *= 2
        return tokens
    tiled = device.type == "cpu" and native.tiles() == 2 and resolve_dtype(dtype, device) == torch.bfloat16
    return MICRO_BATCH_TOKENS["tiles" if tiled else device.type]


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, config: Any = None
) -> tuple[Any, list[str]]:
    """Return the tokenizer, and a sentence for every special token that it lacks and what replaces it.

    config: of its model, which has a say in the tokenizer's class; needed where `name` has no config.json.

    Raises:
        ModelError, HubError: if there is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        with collector.paused(), visible_output():
            tokenizer = AutoTokenizer.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=trust_remote_code,
                local_files_only=not hub.reachable(name),
                **({} if config is None else {"config": config}),
            )
    except Exception as error:  # transformers raises a different kind for each way in which a folder can be wrong
        raise explain(error, name, "tokenizer") from None
    _check_template_names(name, tokenizer.chat_template)
    if not isinstance(tokenizer.model_max_length, (int, float)):
        given = repr(tokenizer.model_max_length)[:40]
        raise ModelError(f"tokenizer_config.json of {name} has model_max_length {given}; write a number of tokens")
    notes = []
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        end = next((token for token in _END_OF_TEXT if token in vocabulary), None)
        if end:
            tokenizer.eos_token = end
            notes.append(f"the tokenizer does not define an end-of-text token; {end!r} is used")
        else:
            notes.append("the tokenizer has no end-of-text token, so add_eos_token is off and answers have no end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        notes.append(f"the tokenizer has no padding token; {tokenizer.pad_token!r} is used (masked, never trained)")
    tokenizer.padding_side = "left"
    return tokenizer, notes


def _check_template_names(name: str, chat_template: Any) -> None:
    """Names of chat templates become file names when the tokenizer is saved."""
    for title in chat_template if isinstance(chat_template, dict) else ():
        if not re.fullmatch(r"[\w-][\w .-]*", title):
            raise ModelError(f"{name} has a chat template {title!r}, which is not a valid file name; rename it")


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the model's configuration.

    Raises:
        ModelError, HubError: if there is no model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=not hub.reachable(name)
        )
        # a file must not choose what computes: transformers would load an attention kernel from the Hub by its name
        config._attn_implementation = config._experts_implementation = None
    except Exception as error:  # as many kinds as there are config classes; explain tells them apart
        raise explain(error, name, "config.json") from None
    _check_sizes(name, config.to_dict())
    classes = config.architectures
    if classes is not None and not (isinstance(classes, list) and all(isinstance(item, str) for item in classes)):
        raise ModelError(
            f"config.json of {name} has architectures that are no list of names; copy or download it again"
        )
    return config


def _check_sizes(name: str, values: dict[str, Any]) -> None:
    """Raise if a size is beyond any model's: building it would take all memory, or for ever."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_sizes(name, value)
        most = next((most for pattern, most in _MOST.items() if re.fullmatch(pattern, str(key))), None)
        if most and isinstance(value, (int, float)) and not 0 <= value <= most:
            raise ModelError(f"config.json of {name} has {key} {value}, which no model has; copy or download it again")


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return a causal model in evaluation mode, on `device`, ready for forest attention.

    Raises:
        ModelError, HubError: if there is no model, or its files are damaged.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    try:
        if not Path(name).exists():
            hub.fetch(name, hub.WEIGHTS, revision=revision)
        with quiet():
            if load_opened.opens(config):
                folder = local_folder(name, revision)
                model, info = load_opened.load_opened(folder, config, dtype, trust_remote_code=trust_remote_code)
            else:
                model, info = text_model.auto_class(config).from_pretrained(
                    name,
                    config=config,
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                    dtype=dtype,
                    use_safetensors=True,
                    local_files_only=not hub.reachable(name),
                    output_loading_info=True,
                )
    except ByeoriError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub each have their own
        raise explain(error, name, "weights") from None
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise ModelError(
            f"the weights of {name} lack {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + "; copy or download them again"
        )
    forest_attention.register()
    return model.to(device).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings inside, but not the bars of downloads, which go with them."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as hf_logging

    logger, downloads = logging.getLogger("transformers"), not are_progress_bars_disabled()
    level, bars = logger.level, hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def local_folder(name: str, revision: str | None = None, files: tuple[str, ...] = hub.MODEL) -> Path:
    """Return the folder `name`, or the one that the Hub's repository is downloaded to (small files and safetensors).

    Raises:
        ModelError, HubError: if it is neither a folder nor can be downloaded.
    """
    if Path(name).exists():
        return Path(name)
    try:
        return hub.fetch(name, files, revision=revision)
    except Exception as error:  # the Hub's client raises many kinds
        raise explain(error, name, "weights") from None


def explain(error: Exception, name: str, what: str) -> ByeoriError:
    """Return one sentence for an error while loading; what: the tokenizer, config.json or weights."""
    chain = hub_errors.chain(error)
    text = " ".join(str(link) for link in chain)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    local = Path(name).exists()
    found = _explain_local(text, reason, Path(name), what) if local else _explain_remote(text, chain, name)
    if found is not None:
        return found
    if "trust_remote_code" in text:
        return ModelError(f"{name} needs its own Python code; read it, and run it with --trust_remote_code {name}")
    return ModelError(f"cannot load the {what} of {name}: {reason}")


def _explain_local(text: str, reason: str, folder: Path, what: str) -> ByeoriError | None:
    if not (folder / "config.json").exists():
        return names.not_a_model(folder)
    signs = ("safetensor", "header", "incomplete metadata", "invalid json", "mmap", "buffer")
    if what != "weights" or not any(sign in text.lower() for sign in signs):
        return None
    if not any(folder.glob("*.safetensors")):
        return ModelError(missing_weights(folder, "safetensors weights"))
    return ModelError(f"the weights in {folder} are damaged or cut short ({reason}); copy or download them again")


def _explain_remote(text: str, chain: list[BaseException], name: str) -> ByeoriError | None:
    if hub.looks_local(name):
        return names.no_folder(name)
    answers = {
        "GatedRepoError": f"{name} is gated; accept its terms on the Hub and log in with `hf auth login`",
        "RepositoryNotFoundError": f"the Hub has no model {name}, or it is private; check the name or `hf auth login`",
        "RevisionNotFoundError": f"{name} does not have this revision on the Hub; check --revision",
    }
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    for kind, sentence in answers.items():
        if kind in kinds:
            return HubError(sentence)
    unreachable = (
        f"{name} is neither a local folder{nearest_file(Path(name))} nor in the cache, and the Hugging Face Hub "
        "cannot be reached; check the name, the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    )
    if found := hub_errors.explanation(chain[0], name, unreachable=unreachable):
        return HubError(found)
    signs = ("connect", "offline", "resolve", "timed out", "network", "couldn't reach", "max retries")
    if any(sign in text.lower() for sign in signs) or not hub.reachable(name):
        return HubError(unreachable)
    return None


def base_of(model: Any) -> Any:
    """Return the causal model of transformers inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compute_dtype(model: Any) -> torch.dtype:
    """Return the type that a model computes in; sharded weights that are trained may be held in float32."""
    causal = base_of(model)
    dtype: torch.dtype = getattr(causal, "byeori_dtype", causal.dtype)
    return dtype


def parts(model: Any) -> tuple[Any, Head]:
    """Return the stack of layers, and what turns its output into logits.

    model: a causal model of transformers, or a PeftModel around one.
    """
    causal = base_of(model)
    return text_model.decoder(causal), text_model.head(causal)


def positions_limit(config: Any) -> int | None:
    """Return the model's maximum length in tokens, or None if it has none."""
    text = text_model.text_config(config)
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "dynamic":  # whose limit stays that before scaling
        limit = int(limit * rope["factor"])
    return limit
